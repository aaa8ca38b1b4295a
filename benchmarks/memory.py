"""Memory: what is saved for backward, the peak, and an allocator that does not disturb the clock."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

import torch
from torch import Tensor

from .case import Contender, Data

# Fresh memory costs a page fault for every 4 KiB, several times the time of a kernel that fills it, for every contender
# alike. So freed memory stays in the process (no mmap, no trimming, one arena), in pages of 2 MiB where the system can.
TUNABLES = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"
)


def keep_freed_memory() -> None:
    """Starts this command again under these settings, which glibc reads once."""
    if sys.platform == "linux" and os.environ.get("GLIBC_TUNABLES") != TUNABLES:
        environment = {**os.environ, "GLIBC_TUNABLES": TUNABLES}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], environment)


def warm(size: int) -> None:
    """Takes memory once, touches it and gives it back to the process.

    Without this, the heap grows for a long time: a freed tensor leaves a hole that is a few bytes too small for the
    next of its size, once a small object lies behind it.
    """
    libc = _libc()
    if libc is None:
        return
    block = libc.malloc(size)
    if block:
        ctypes.memset(block, 0, size)
        libc.malloc(64)  # stays: a free block at the end of the heap would be handed out last
        libc.free(block)


def give_back() -> None:
    """Gives freed memory back to the system, between cases: of all that stays in the process holes grow."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def clone_over_copy(elements: int) -> float:
    """Time of `x.clone()` over that of `y.copy_(x)`: near 1 if memory stays in the process, 2 to 10 if not."""
    from .measure import palindrome

    x = torch.zeros(elements)
    y = torch.empty_like(x)
    x.clone()
    times = palindrome({"clone": x.clone, "copy": lambda: y.copy_(x)}, {"clone": 1, "copy": 1}, 5, "cpu")
    return sorted(times["clone"])[2] / sorted(times["copy"])[2]


def saved_bytes(contender: Contender, data: Data) -> int:
    """Bytes of all storages that a call saves for backward, each once, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in contender.parameters(data)}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = contender.call(data)
    total = sum(storages.values())
    del y
    return total


def peak_bytes(contender: Contender, data: Data, device: str) -> int | None:
    """The most that forward and backward take beyond the inputs, or None where nobody can say.

    On CUDA torch's own count. On Linux the high-water mark of the resident memory, which sees what C++ code takes, too;
    for that, free memory is given back to the system before (in a process of its own: see `peak`).
    """

    def both() -> Any:
        y = contender.call(data)
        return y, torch.autograd.grad(y, [data.x, *contender.parameters(data)], data.dy)

    both()  # code and thread pools are loaded before
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    libc = _libc()
    if libc is None:
        return None
    libc.malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the mark back
    except OSError:
        return None
    before = _status("VmRSS")
    both()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def _libc() -> Any:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc
