"""Memory: what is saved for backward, the peak, and a heap that is large before the clock starts."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

import torch
from torch import Tensor

from .case import Contender, Data


def warm(size: int) -> None:
    """Takes memory once, touches it and gives it back to the process.

    Without this, a heap that keeps freed memory grows for a long time: a freed tensor leaves a hole that is a few bytes
    too small for the next of its size, once a small object lies behind it.
    """
    libc = _libc()
    if libc is None:
        return
    block = libc.malloc(size)
    if block:
        ctypes.memset(block, 0, size)
        libc.malloc(64)  # stays: a free block at the end of the heap would be handed out last
        libc.free(block)


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
    for that, free memory is given back to the system before, so nothing is timed in the same process.
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
