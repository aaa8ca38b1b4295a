"""torch.compile of a contender, before anything is timed, and not longer than a limit."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import torch

from .case import Contender, Data
from .measure import runner

LIMIT = 60
"""Seconds for one contender, forward and backward."""


class _TooLongError(BaseException):
    """Not an Exception: the compiler catches those."""


PREFIX = "torch.compile: "


def compiled(contender: Contender, *, dynamic: bool = False) -> Contender:
    _trust_the_compiler()
    return Contender(
        PREFIX + contender.name,
        torch.compile(contender.call, dynamic=dynamic),
        contender.module,
        forward_only=contender.forward_only,
    )


def _trust_the_compiler() -> None:
    """Otherwise every process tries every instruction set in processes of its own, 20 s in all.

    A C++ compiler that lacks one that the processor has then compiles nothing, and `ready` says so.
    """
    from torch._inductor.cpu_vec_isa import VecISA

    VecISA.check_build = lambda self, code: True


def ready(
    contender: Contender,
    *buffers: Data,
    limit: int = LIMIT,
    modes: Sequence[str] = ("forward", "forward+backward"),
) -> str | None:
    """Compiles the modes for these shapes. None, or why there is no result."""

    def stop(_: int, __: FrameType | None) -> NoReturn:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        for mode in modes:
            run = runner(contender, buffers, mode)
            for _ in buffers:
                run()
    except _TooLongError:
        return f"not compiled within {limit} s"
    except Exception as error:
        return f"not compiled: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None
