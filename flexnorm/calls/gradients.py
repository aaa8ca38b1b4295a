"""The autograd Functions of a call.

Moments and sums over sets have the shape that the pattern writes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..kernels import Operands, Sums
from ..library import library
from ..statistics import Moments
from ..watching import seen_through, unwatched
from .computing import Bound, Closer, How, itself
from .steps import Step

_KERNELS: Any = library()


class Normalize(torch.autograd.Function):
    """Saves x, the user's own operands and what is kept of the sets; nothing else of x's size."""

    @staticmethod
    def forward(
        ctx: Any,
        how: How,
        kept: list[Any] | None,  # takes what `how.moments` is made of
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        if type(how) is Bound:
            found = _KERNELS.forward(how[0], x, mask, weight, bias, how[1])
            if found is None:
                raise Closer
        else:
            found = how.forward(x, mask, weight, bias)
        ctx.how = how
        ctx.save_for_backward(x, mask, weight, bias, *found[1:])
        if kept is not None:
            kept.extend(found[1:])
        y: Tensor = found[0]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        how, needs = ctx.how, ctx.needs_input_grad
        saved = ctx.saved_tensors  # asked for once: checkpointing unpacks each time
        if type(how) is Bound and (needs[2] or needs[3]) and not torch.is_grad_enabled() and unwatched(dy):
            x, mask, weight, bias, moments, count = saved  # what most calls need, without a detour
            found = _KERNELS.backward(how.pattern, x, mask, weight, bias, how.groups, dy, moments, count, needs[3])
            if found is not None:
                return (None, None, *found)
        operands, kept = Operands(*saved[:4]), saved[4:]
        if torch.is_grad_enabled() or not unwatched(dy):  # differentiated again: of moments that depend on x
            how = how.composed(operands)
            return (None, None, *how.backward(operands, how.forward(*operands)[1:], dy, needs[3]))
        if needs[2] or needs[3]:
            try:
                return (None, None, *how.backward(operands, kept, dy, needs[3]))
            except Closer:
                how = how.composed(operands)
                return (None, None, *how.backward(operands, how.forward(*operands)[1:], dy, needs[3]))
        try:
            sums = how.backward_sums(operands, how.moments(operands.x, kept), dy)
        except Closer:
            how = how.composed(operands)
            sums = how.backward_sums(operands, how.moments(operands.x, how.forward(*operands)[1:]), dy)
        return (None, None, None, None, sums.weight, sums.bias)


class Stepped(torch.autograd.Function):
    """y, with a step over sets between the two passes over x."""

    @staticmethod
    def forward(
        ctx: Any,
        how: How,
        step: Step,
        kept: list[Moments] | None,  # takes the moments of x
        share: Tensor | None,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        own = step.merged(how.statistics(x, mask))
        used = step.used(how, own, share)
        ctx.how, ctx.step = how, step
        ctx.save_for_backward(share, x, mask, weight, bias, own.count, own.mean, own.m2, own.low)
        if kept is not None:
            kept.append(own)
        return itself(how.apply(Operands(x, mask, weight, bias), used))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        share, x, mask, weight, bias, *fields = ctx.saved_tensors
        how, step, operands, own = ctx.how, ctx.step, Operands(x, mask, weight, bias), Moments(*fields)
        if torch.is_grad_enabled() or seen_through((dy, x)):  # differentiated again: of moments that depend on x
            how = how.composed(operands)
            own = step.merged(how.statistics(x, mask))
        used = step.used(how, own, share)
        try:
            sums = how.backward_sums(operands, used, dy)
        except Closer:
            how = how.composed(operands)
            sums = how.backward_sums(operands, used, dy)
        whole, dshare = step.back(how, own, used, share, sums)
        if not step.needed:
            return None, None, None, dshare, None, None, sums.weight, sums.bias
        try:
            dx, dmask = how.backward_dx(operands, used, dy, whole)
        except Closer:
            dx, dmask = how.composed(operands).backward_dx(operands, used, dy, whole)
        return None, None, None, dshare, dx, dmask, sums.weight, sums.bias


class Statistics(torch.autograd.Function):
    """The moments of x; and for a partner, which normalizes x by moments made of these, x and a place for its answer.

    `Apply` takes x and the place from here, and answers in its backward pass: "the gradient of x" is dy, and "the
    gradient of the place" is the moments that x was normalized by. This backward pass then knows all, and reads x once.
    Whatever lies between the two Functions is ordinary autograd, and no state outlives a pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        how: How,
        partner: bool,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        m = how.statistics(x, mask)
        fields = (m.count, m.mean, m.m2, m.low)
        ctx.how = how
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mask, weight, bias, *fields)
        ctx.mark_non_differentiable(*(t for t in (m.count, m.low) if t is not None))
        if not partner:
            return fields
        place = m.mean.new_empty(()).expand(4, *m.mean.shape)
        return *fields, x.detach(), place

    @staticmethod
    def backward(
        ctx: Any,
        _: None,
        dmean: Tensor | None,
        dm2: Tensor | None,
        __: None,
        dy: Tensor | None = None,
        answer: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        operands, own = Operands(*saved[:4]), Moments(*saved[4:])
        dx = dy
        if answer is not None:
            assert dy is not None
            dx = Statistics._of_partner(ctx.how, operands, own, (dmean, dm2), dy, answer)
        elif dmean is not None or dm2 is not None:
            dx = Statistics._of_moments(ctx.how, operands, own, dmean, dm2)
            dx = dx if dy is None else dx + dy
        return None, None, dx, None, None, None

    @staticmethod
    def _of_moments(how: How, operands: Operands, own: Moments, dmean: Tensor | None, dm2: Tensor | None) -> Tensor:
        x, mask, *_ = operands
        if torch.is_grad_enabled() or seen_through((dmean, dm2, x)):  # differentiated again: by the composition
            with torch.enable_grad():
                m = how.composed(operands).statistics(x, mask)
                pairs = [(t, d) for t, d in ((m.mean, dmean), (m.m2, dm2)) if d is not None]
                outputs, given = zip(*pairs, strict=True)
                return torch.autograd.grad(outputs, (x,), given, create_graph=True)[0]
        sums = how.sums_of_changed(own, own, dmean, dm2)
        plain = Operands(x, mask)
        try:
            return how.backward_dx(plain, own, None, sums)[0]
        except Closer:
            return how.composed(operands).backward_dx(operands, own, None, sums)[0]

    @staticmethod
    def _of_partner(
        how: How,
        operands: Operands,
        own: Moments,
        gradients: tuple[Tensor | None, Tensor | None],
        dy: Tensor,
        answer: Tensor,
    ) -> Tensor:
        count, mean, m2, low = answer.unbind()
        used, sums = Moments(count, mean, m2, low), None
        if any(d is not None for d in gradients):
            sums = how.sums_of_changed(used, own, *gradients)
        try:
            return how.backward_dx(operands, used, dy, sums)[0]
        except Closer:
            return how.composed(operands).backward_dx(operands, used, dy, sums)[0]


def has_partner(options: Any, x: Tensor, mask: Tensor | None) -> bool:
    """Whether one pass over x can serve the gradients of both: of x by its own moments, and by the changed ones."""
    sums = options.center and options.scale and options.eps != 0
    return sums and x.requires_grad and not (mask is not None and mask.requires_grad)


class Apply(torch.autograd.Function):
    """Normalizes by moments from elsewhere, to which gradients flow."""

    @staticmethod
    def forward(
        ctx: Any,
        how: How,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        count: Tensor,
        mean: Tensor,
        m2: Tensor,
        low: Tensor | None,
        place: Tensor | None,
    ) -> Tensor:
        fields = (count, mean, m2, low)
        y = itself(how.apply(Operands(x, mask, weight, bias), Moments(*fields)))
        ctx.how, ctx.partner = how, place is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mask, weight, bias, *fields)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        operands, moments = Operands(*saved[:4]), Moments(*saved[4:])
        if torch.is_grad_enabled() or not unwatched(dy):
            return Apply._gradients(ctx, ctx.how.composed(operands), False, operands, moments, dy)
        try:
            return Apply._gradients(ctx, ctx.how, ctx.partner, operands, moments, dy)
        except Closer:
            return Apply._gradients(ctx, ctx.how.composed(operands), False, operands, moments, dy)

    @staticmethod
    def _gradients(
        ctx: Any, how: How, partner: bool, operands: Operands, moments: Moments, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        sums = Sums(*[None] * 4)  # type: ignore[arg-type]
        if any(needs[3:9]):
            sums = how.backward_sums(operands, moments, dy)
        dx = answer = None
        if partner:
            dx = dy
            answer = torch.stack([t.to(moments.mean.dtype) for t in moments._fields])
        elif needs[1]:
            dx = how.backward_dx(operands, moments, dy, None)[0]
        of_moments = how.gradients_of_moments(moments, sums) if any(needs[5:9]) else (None, None, None)
        return (None, dx, None, sums.weight, sums.bias, *of_moments, None, answer)


# These go to C at once. `Function.apply` first asks in Python for torch.func, which takes 5 us. Callers have asked.
normalized = super(torch.autograd.Function, Normalize).apply
measured = super(torch.autograd.Function, Statistics).apply
applied = super(torch.autograd.Function, Apply).apply
stepped = super(torch.autograd.Function, Stepped).apply
# A node calls `apply` of its class, which looks for a `vjp` in Python. This one is the backward itself.
cast(Any, Normalize)._backward_cls.apply = Normalize.backward
