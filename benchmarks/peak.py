"""Peak memory of forward and backward, in a process of its own that gives free memory back to the system.

`python -m benchmarks.peak cpu 2 '[["case", "contender"], ...]'` prints one line of JSON for each: the most bytes beyond
the inputs over the bytes of x. The least is 2: y and dx.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch


def measured(device: str, threads: int, wanted: list[list[str]], seconds: float) -> tuple[dict[str, float], str | None]:
    """For each "case: contender" its peak, and what went wrong, if anything did."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", "benchmarks.peak", device, str(threads), json.dumps(wanted)]
    wrong = None
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=seconds, check=False)
        out = done.stdout
        if done.returncode:
            wrong = f"peak memory: the process ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        out, wrong = error.stdout or b"", "peak memory: time is up"
    found: dict[str, float] = {}
    for line in out.decode().splitlines():
        found |= json.loads(line)
    return found, wrong


def main(device: str, threads: int, wanted: list[list[str]]) -> None:
    from . import gpu
    from .cases import by_name
    from .compiled import compiled
    from .memory import peak_bytes

    torch.set_num_threads(threads)
    for name, contender in wanted:
        case = by_name[name]
        everybody: dict[str, Any] = {c.name: c for c in [case.contender, *case.peers, *gpu.peers(case)]}
        everybody |= {c.name: c for c in [compiled(p) for p in case.peers if p.formula]}
        data = case.draw(1.0, device)
        data.x.requires_grad_()
        peak = peak_bytes(everybody[contender], data, device)
        print(json.dumps({f"{name}: {contender}": None if peak is None else peak / data.x.nbytes}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
