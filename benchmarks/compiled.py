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


def compiled(contender: Contender, *, dynamic: bool = False) -> Contender:
    return Contender(
        f"torch.compile: {contender.name}",
        torch.compile(contender.call, dynamic=dynamic),
        contender.module,
        forward_only=contender.forward_only,
    )


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
