"""Who watches a computation: a tracer, a transform, a mode. The kernels are invisible to all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_traced_by_jit = torch._C._get_tracing_state


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
