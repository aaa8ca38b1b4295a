"""torch.compile of a contender, before anything is timed, and not longer than a limit."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

import torch

from .case import Contender, Data
from .measure import runner

LIMIT = 60
"""Seconds for one contender, forward and backward."""


class _TooLongError(BaseException):
    """Not an Exception: the compiler catches those."""


def compiled(contender: Contender) -> Contender:
    return Contender(
        f"torch.compile: {contender.name}",
        torch.compile(contender.call, dynamic=False),
        contender.module,
        forward_only=contender.forward_only,
    )


def ready(contender: Contender, data: Data, limit: int = LIMIT) -> str | None:
    """Compiles both modes for these shapes. None, or why there is no result."""

    def stop(_: int, __: FrameType | None) -> NoReturn:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        for mode in ("forward", "forward+backward"):
            runner(contender, [data], mode)()
    except _TooLongError:
        return f"not compiled within {limit} s"
    except Exception as error:
        return f"not compiled: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None
