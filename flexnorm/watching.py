"""Who watches a computation: a tracer, a transform, a mode. The kernels are invisible to all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_traced_by_jit = torch._C._get_tracing_state
_batched = torch._C._functorch.is_legacy_batchedtensor  # `is_grads_batched` makes these, and no transform is active


def unwatched(t: object) -> bool:
    """Whether t is a plain tensor, and nothing watches what is computed from it: no compiler or tracer, no mode of
    `torch.utils._python_dispatch`, no transform of `torch.func`, no forward-mode derivative. Half a microsecond."""
    return (
        (type(t) is Tensor or type(t) is Parameter)
        and not is_compiling()
        and not _dispatch_modes()
        and not _transforms()
        and forward_ad._current_level < 0
        and _traced_by_jit() is None
    )


def any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd asks for the gradient of one."""
    for t in tensors:  # noqa: SIM110  # any() of a generator takes twice the time, at every call
        if t is not None and t.requires_grad:
            return True
    return False


def seen_through(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody has to see the operations themselves, so that nothing may hide them."""
    if is_compiling() or _dispatch_modes() or _traced_by_jit():
        return True
    for t in tensors:
        if t is not None and (t.is_neg() or _batched(t) or (type(t) is not Tensor and type(t) is not Parameter)):
            return True  # a lazy minus sign is not in memory, and who knows what a subclass means
    return derived(tensors)


def derived(tensors: Iterable[Tensor | None]) -> bool:
    """Whether torch.func or forward mode is at work: an operator or an autograd Function would give the derivative
    zero, silently."""
    if _transforms():
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]
        for t in tensors
    )
