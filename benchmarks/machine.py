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


def caches() -> list[str]:
    """Every cache that the first core sees: "L2 Unified 2048K"."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    words = (tuple((folder / name).read_text().strip() for name in ("level", "type", "size")) for folder in folders)
    return [f"L{level} {kind} {size}" for level, kind, size in words]


SETTLED = ("GLIBC_TUNABLES", "LD_PRELOAD", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "FLEXNORM_CPU")


def settled() -> dict[str, str]:
    """The environment variables that change the allocator, the threads or the kernels: a plain process has none."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name in SETTLED or name.startswith(("MALLOC_", "TCMALLOC_", "MIMALLOC_"))
    }


def plain() -> None:
    """Ends the command if this process is none."""
    if found := settled():
        raise SystemExit(f"a plain process is measured: unset {', '.join(found)}")


def allocator() -> str:
    """Of malloc: a library that was loaded before libc, or libc."""
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        loaded = ""
    preloaded = [name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in loaded]
    return preloaded[0] if preloaded else " ".join(platform.libc_ver()).strip() or platform.system()


def huge_pages() -> str | None:
    """When the system gives pages of 2 MiB on its own: always, on request (madvise), never. None if it does not say."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.read_text().split("[")[1].split("]")[0] if path.exists() else None


def memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def described(device: str) -> dict[str, Any]:
    return {
        "processor": _processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "memory_gib": memory_gib(),
        "cache_mib": round(cache_bytes(device) / 2**20, 1),
        "caches": caches(),
        "page_kib": os.sysconf("SC_PAGE_SIZE") // 1024,
        "huge_pages": huge_pages(),
        "allocator": allocator(),
        "load": os.getloadavg()[0],  # before anything is measured; near 0, or the times are those of others too
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
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
