"""The compiled library: the one module without Python source. It knows nothing of torch but what `setup` tells it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INTERFACE = 5  # that of module.cpp
PAGES = ("ask", "fresh", "resident")  # FLEXNORM_PAGES: what is known of the pages of large results (pages.h)
LARGE = 2**20  # elements of a call that makes it worth a warning that there is no library
_LEFT_OUT = "the C++ kernels are left out by FLEXNORM_CPU=0"
_warned = threading.Lock()  # held from the first warning on


@cache
def library() -> Any:
    """The module of the C++ kernels, or why there is none.

    FLEXNORM_CPU=0 in the environment leaves it out. FLEXNORM_PAGES=fresh or resident says what the kernels otherwise
    ask the system: whether the memory of a large result has to be made page by page.
    """
    if os.environ.get("FLEXNORM_CPU") == "0":
        return _LEFT_OUT
    path = Path(__file__).with_name("kernels") / "cpu" / "_kernels.abi3.so"
    if not path.exists():
        return "the C++ kernels were not built: there was no compiler when flexnorm was installed"
    name = "flexnorm.kernels.cpu._kernels"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        found = importlib.util.module_from_spec(spec)
        loader.exec_module(found)
    except ImportError as error:
        return f"the C++ kernels cannot be loaded: {error}"
    if getattr(found, "INTERFACE", None) != INTERFACE:
        return "the C++ kernels are those of another version: install flexnorm again"
    set_up(found, getattr(Tensor, "__dlpack_c_exchange_api__", None))
    return found


def warn_if_missing() -> None:
    """One warning in a process, of a library that somebody may miss: it was not left out on purpose."""
    why = library()
    if type(why) is str and why != _LEFT_OUT and _warned.acquire(blocking=False):
        warnings.warn(
            f"flexnorm: {why}. torch's operations take their place, several times slower on a CPU. To get them, with a "
            "C++17 compiler and Python's headers (Debian: python3-dev): pip install --force-reinstall flexnorm",
            stacklevel=2,
        )


def set_up(module: Any, exchange: Any) -> None:
    """Tells the library where torch's functions are. `exchange` is torch's table of DLPack functions (2.10 and later);
    without it tensors are read by their attributes."""
    module.setup(torch, _converted, _copied, exchange)
    known = os.environ.get("FLEXNORM_PAGES", "ask")
    if known not in PAGES:
        raise ValueError(f"FLEXNORM_PAGES is one of {', '.join(PAGES)}, not {known!r}")
    module.set_pages(PAGES.index(known))


def _converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype).contiguous()


def _copied(like: Tensor, source: Tensor | None = None) -> Tensor:
    """The same values with the dtype of `like`, and the strides that its results have."""
    return torch.empty_like(like).copy_((like if source is None else source).detach())
