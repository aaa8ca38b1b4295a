"""What it ran on: no result means anything without it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

SOMETHING = 32 << 20
"""Bytes of a last-level cache, where the system does not say."""


def cache_bytes(device: str) -> int:
    """Of the last-level cache: L2 on a GPU."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
    return max(sizes, default=SOMETHING)


def described(device: str) -> dict[str, Any]:
    return {
        "processor": _processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "cache_mib": round(cache_bytes(device) / 2**20, 1),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
    }


def versions() -> dict[str, str]:
    wanted = {"flexnorm", "torch", "torch-geometric", "liger-kernel", "quack-kernels", "apex"}
    found = {d.name.lower(): d.version for d in distributions() if (d.name or "").lower() in wanted}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
