"""Moments of mixtures by the library: merged to those of every pattern, given back to the finest sets, and mixed.

The composition (`Moments.coarsen`, `refine`, `mixed`) is the general way, and what is differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..library import library
from ..partition import Packed
from ..statistics import Moments
from ..watching import any_requires_grad, seen_through, unwatched

Way = tuple[bytes | None, tuple[Packed, ...], Tensor | None, Tensor | None]
"""The pattern from the finest sets to larger ones (None: to themselves), its labels, running mean and variance."""

Composition = Callable[[Moments, Sequence[Tensor]], Moments]
"""From the moments of the finest sets and the logits to the moments of the mixtures."""

Kept = tuple[Tensor, Tensor]  # moments [3, *sets]: mean, low and M2 side by side; and the count


class Mixing(NamedTuple):
    """How moments are mixed.

    Attributes:
        ways: one for each pattern.
        eps: that of the norm.
        results: results are mixed, and not moments.
        wanted: for every pattern, whether its own moments are wanted; () for none.
        composition: the same in operations that can be differentiated again.
    """

    ways: tuple[Way, ...]
    eps: float
    results: bool
    wanted: tuple[bool, ...]
    composition: Composition


def reads(own: Moments) -> bool:
    """Whether the library may read these moments: they are plain numbers on a CPU, and no tracer watches them."""
    mean = own.mean
    return type(_KERNELS) is not str and unwatched(mean) and mean.is_cpu and not own.count.requires_grad


def mix(how: Mixing, own: Moments, logits: Sequence[Tensor]) -> tuple[Moments, tuple[Kept | None, ...]] | None:
    """The moments of the mixtures, and those of the wanted patterns. None: the composition has to be asked.

    Args:
        own: the moments of the finest sets.
        logits: of means and variances; or of both, or of results.
    """
    of_means, of_vars = logits if len(logits) > 1 else (logits[0], None)
    fields = (own.count, own.mean, own.m2, own.low)
    if torch.is_grad_enabled() and any_requires_grad((own.mean, own.m2, of_means, of_vars)):
        kept: list[Any] = []
        found: Any = mixed(how, kept, *fields, of_means, of_vars)  # type: ignore[no-untyped-call]
        if found is None:
            return None
        return Moments(*found), kept[0]
    found = _KERNELS.mix(*fields, how.ways, of_means, of_vars, how.eps, how.results, how.wanted)
    return None if found is None else (Moments(*found[:4]), found[4])


class Mixed(torch.autograd.Function):
    """Saves the finest moments and the logits. The backward pass merges the moments of the patterns again."""

    @staticmethod
    def forward(
        ctx: Any,
        how: Mixing,
        kept: list[Any],  # takes the moments of the wanted patterns
        count: Tensor,
        mean: Tensor,
        m2: Tensor,
        low: Tensor | None,
        of_means: Tensor,
        of_vars: Tensor | None,
    ) -> tuple[Tensor, ...] | None:
        found = _KERNELS.mix(count, mean, m2, low, how.ways, of_means, of_vars, how.eps, how.results, how.wanted)
        if found is None:
            return None
        *fields, patterns = found
        kept.append(patterns)
        ctx.how = how
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(count, mean, m2, low, of_means, of_vars)
        ctx.mark_non_differentiable(fields[0], fields[3])
        return tuple(fields)

    @staticmethod
    def backward(ctx: Any, _: Any, dmean: Tensor | None, dm2: Tensor | None, *__: Any) -> tuple[Tensor | None, ...]:
        if dmean is None and dm2 is None:
            return (None,) * 8
        count, mean, m2, low, of_means, of_vars = ctx.saved_tensors
        how: Mixing = ctx.how
        if not torch.is_grad_enabled() and not seen_through((dmean, dm2)):
            found = _KERNELS.mix_backward(
                count, mean, m2, low, how.ways, of_means, of_vars, how.eps, how.results, dmean, dm2
            )
            if found is not None:
                to_mean, to_m2, to_means, to_vars = found
                return None, None, None, to_mean, to_m2, None, to_means, to_vars
        with torch.enable_grad():  # differentiated again: by the composition
            # Each by a name of its own: one may lie behind another, as where a gate reads the moments.
            mean, m2 = mean.view_as(mean), m2.view_as(m2)
            logits = [t.view_as(t) for t in (of_means, of_vars) if t is not None]
            result = how.composition(Moments(count, mean, m2, low), logits)
            outputs = [(t, g) for t, g in ((result.mean, dmean), (result.m2, dm2)) if g is not None and t.requires_grad]
            needs = ctx.needs_input_grad[3:5] + ctx.needs_input_grad[6 : 6 + len(logits)]
            wanted = [t for t, needed in zip((mean, m2, *logits), needs, strict=True) if needed]
            results, given = zip(*outputs, strict=True)
            gradients = iter(torch.autograd.grad(results, wanted, given, create_graph=True, allow_unused=True))
        of_mean, of_m2, *rest = (next(gradients) if needed else None for needed in needs)
        return None, None, None, of_mean, of_m2, None, *rest, *([None] * (2 - len(rest)))


_KERNELS: Any = library()  # a text where there is none

# To C at once, as in gradients.py. Callers have asked for torch.func.
mixed = super(torch.autograd.Function, Mixed).apply
cast(Any, Mixed)._backward_cls.apply = Mixed.backward
