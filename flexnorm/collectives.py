"""Collectives of `torch.distributed`, as statistics over several ranks need them.

Both are differentiable to any order, where the loss is the sum of the losses of all ranks. A rank that raises alone
would leave the others waiting, so all ranks `agree` before the first collective: they go on together, or all raise.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ShapeError, SpecError, say, shown


def group_of(process_group: Any) -> Any:
    """The process group: the default one for None, that of a `DeviceMesh` of one dimension.

    Raises:
        RuntimeError: there is none, or this rank is not in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            say(
                "statistics over several ranks need a process group, and none is initialized",
                received=f"process_group={shown(process_group)}",
                instead='torch.distributed.init_process_group("gloo") before the first call, under torchrun; '
                "no sharded= for one process",
            )
        )
    if process_group is None:
        return dist.group.WORLD
    if hasattr(process_group, "get_group"):
        process_group = process_group.get_group()
    if not isinstance(process_group, dist.ProcessGroup):
        outside = process_group == dist.GroupMember.NON_GROUP_MEMBER
        raise RuntimeError(
            say(
                "this rank is not in the process group" if outside else "process_group is one of torch.distributed",
                received=f"rank {dist.get_rank()}" if outside else f"process_group={shown(process_group)}",
                instead="call the layer on the ranks of its group only"
                if outside
                else "torch.distributed.new_group(ranks), or None for all ranks",
            )
        )
    return process_group


def gather(t: Tensor, group: Any, *, replicated: bool = False) -> Tensor:
    """The tensors of all ranks, in their order: (rank, ...). They have one shape.

    With `replicated`, the loss is one, which all ranks compute alike, as with DTensors.
    """
    gathered: Tensor = _Gather.apply(t, group, replicated)  # type: ignore[no-untyped-call]
    return gathered


def add(t: Tensor, group: Any) -> Tensor:
    """The sum of the tensors of all ranks, which have one shape."""
    total: Tensor = _Add.apply(t, group)  # type: ignore[no-untyped-call]
    return total


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return add(dy, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any, replicated: bool) -> Tensor:
        ctx.group, ctx.replicated = group, replicated
        t = t.contiguous()
        parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, t, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return (dy if ctx.replicated else add(dy, ctx.group))[dist.get_rank(ctx.group)], None, None


def agree(
    groups: Sequence[Any], what: str, *, differentiated: bool, needed: bool, error: BaseException | None = None
) -> bool:
    """Whether any rank needs the gradient; raises on all ranks where they cannot go on together.

    One small collective in every group, of numbers in the memory of the CPU wherever the group has a backend for it,
    so that no device is waited for.

    Args:
        groups: one behind the other, as of the dimensions of a mesh.
        what: what is to be merged, in words that are the same on all ranks.
        differentiated: a backward pass may follow.
        needed: the gradient of x is needed here.
        error: why this rank cannot go on. It is for the caller to raise.

    Raises:
        RuntimeError: another rank has failed.
        ShapeError: ranks differ in what they merge, or in whether a gradient is asked for.
    """
    code = 0 if error is not None else 1 + zlib.crc32(what.encode())  # a rank that fails says 0 and fits to nobody
    told = [error is not None, needed, code, -code, differentiated, -differentiated]
    for group in groups:
        numbers = torch.tensor([int(number) for number in told], device=_device(group))
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        told = numbers.tolist()
    failed, some_need, most, least, some, few = told
    if not failed and most == -least and some == -few:
        return bool(some_need)
    mine = f"{type(error).__name__}: {error}" if error is not None else None
    said: list[Any] = [(dist.get_rank(), mine, what, differentiated)]
    for group in groups:
        lists: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(lists, said, group=group)
        said = sorted({one for each in lists for one in each})
    if error is not None:
        return False
    if failed:
        rank, text = next((rank, text) for rank, text, _, _ in said if text is not None)
        raise RuntimeError(
            say(
                f"rank {rank} has failed, so no rank goes on",
                received=f"on rank {rank}: {text}",
                instead=f"what rank {rank} is told to",
            )
        )
    if most != -least:
        received, instead = "; ".join(f"rank {r}: {w}" for r, _, w, _ in said), "the same sets on all ranks"
        raise ShapeError(
            say(
                "ranks merge the statistics of the same sets, numbered alike; give labels a count, and leave no axis "
                "but the sharded ones to differ",
                received=received,
                instead=instead,
            )
        )
    received = "; ".join(f"rank {r}: {'a' if d else 'no'} gradient" for r, _, _, d in said)
    rule = "a gradient is asked for on all ranks, or on none, as the backward pass is one of all ranks"
    raise SpecError(say(rule, received=received, instead="x.requires_grad_() on all ranks, or torch.no_grad() on all"))


def _device(group: Any) -> torch.device:
    kinds = [device.type for device in group._device_types]
    return torch.device("cpu" if "cpu" in kinds or not kinds else kinds[0])
