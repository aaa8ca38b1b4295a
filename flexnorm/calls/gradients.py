"""The autograd Functions of a call, and the two ways in which it is computed: bound by the library, or by a backend.

Moments and sums over sets have the shape that the pattern writes, here and everywhere above.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import SpecError, say
from ..kernels import Gradients, Kept, Operands, Recipe, Room, Sums, Whole, aten
from ..library import library
from ..partition import Packed, Partition
from ..sets import Sets
from ..statistics import Moments, each
from ..watching import unwatched
from .arguments import Formula

_KERNELS: Any = library()  # a text where there is none; then no formula has a pattern


_batched = torch._C._functorch.is_legacy_batchedtensor  # `is_grads_batched` makes these, and no transform is active


class Closer(Exception):  # noqa: N818  # no error: Python has to look closer at the arguments
    """The library has given no answer."""


class Bound(NamedTuple):
    """A call that the library computes: it binds the pattern to the tensors anew, forward and backward."""

    pattern: bytes
    groups: tuple[Packed, ...]
    formula: Formula
    labels: Mapping[str, Partition]

    @property
    def options(self) -> Any:
        return self.formula.options

    def forward(self, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
        """y, moments side by side, and the count, if sets differ in it."""
        found: tuple[Any, ...] | None = _KERNELS.forward(self.pattern, x, mask, weight, bias, self.groups)
        if found is None:
            raise Closer
        return found

    def moments(self, x: Tensor, kept: Kept) -> Moments:
        return moments_of(x, kept)

    def keep(self, x: Tensor, m: Moments) -> tuple[Any, ...]:
        """The reverse of `moments`."""
        low = torch.zeros_like(m.mean) if m.low is None else m.low
        return torch.stack([m.mean, low, m.m2]).contiguous(), m.count  # stacked, channels-last tensors still are

    def backward(self, operands: Operands, kept: Kept, dy: Tensor, of_mask: bool) -> Gradients:
        found: tuple[Any, ...] | None = _KERNELS.backward(self.pattern, *operands, self.groups, dy, *kept, of_mask)
        if found is None:
            raise Closer
        return found  # type: ignore[return-value]  # the same four, and a tuple more takes its time

    def statistics(self, x: Tensor, mask: Tensor | None) -> Moments:
        return Moments(*_answer(_KERNELS.statistics(self.pattern, x, mask, None, None, self.groups)))

    def apply(self, operands: Operands, m: Moments) -> Tensor:
        y: Tensor = _answer(_KERNELS.apply(self.pattern, *operands, self.groups, m.count, m.mean, m.m2, m.low))
        return y

    def backward_sums(self, operands: Operands, m: Moments, dy: Tensor) -> Sums:
        given = (self.pattern, *operands, self.groups, m.count, m.mean, m.m2, m.low, dy)
        return Sums(*_answer(_KERNELS.backward_sums(*given)))

    def backward_dx(
        self, operands: Operands, m: Moments, dy: Tensor | None, sums: Sums | None
    ) -> tuple[Tensor, Tensor | None]:
        both = (None, None) if sums is None else sums[:2]
        given = (self.pattern, *operands, self.groups, m.count, m.mean, m.m2, m.low, dy, *both)
        return cast("tuple[Tensor, Tensor | None]", _answer(_KERNELS.backward_dx(*given)))

    def gradients_of_moments(self, m: Moments, sums: Sums) -> tuple[Tensor | None, ...]:
        """The gradients of count, mean and M2 from elsewhere."""
        o = self.options
        given = (m.count, m.mean, m.m2, sums.grad, sums.grad_xhat, float(o.eps), o.center, o.scale)
        found: tuple[Tensor | None, ...] | None = _KERNELS.gradients_of_moments(*given)
        return aten.backward_moments(o, m, sums) if found is None else found

    def sums_of_changed(self, used: Moments, own: Moments, dmean: Tensor | None, dm2: Tensor | None) -> Sums:
        """The sums of which `backward_dx`, at the used moments, makes the gradient of x through its own moments."""
        given = (used.count, used.mean, used.m2, used.low, own.count, own.mean, own.low, dmean, dm2)
        found = _KERNELS.sums_of_changed(*given, float(self.options.eps))
        if found is None:
            return _sums_of_changed(self.options, used, own, dmean, dm2)
        return Sums(found[0], found[1], None, None)

    def composed(self, operands: Operands) -> Composed:
        """The same in operations that can be differentiated again."""
        params = [operands[2:]] if self.formula.affines else []
        recipe, _ = self.formula.prepare(operands.x, operands.mask, params, self.labels)
        return Composed(recipe, cast(Room, aten))


class Composed(NamedTuple):
    """A call that a backend computes: the recipe of these tensors, and the backend."""

    recipe: Recipe
    room: Room

    @property
    def options(self) -> Any:
        return self.recipe

    @property
    def sets(self) -> Sets:
        return self.recipe.sets

    def forward(self, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
        y, kept = self.room.forward(self.recipe, Operands(x, mask, weight, bias))
        return itself(y), *kept

    def moments(self, x: Tensor, kept: Kept) -> Moments:
        return self.room.moments(self.recipe, Operands(x), kept).outward(self.sets)

    def keep(self, x: Tensor, m: Moments) -> tuple[Any, ...]:
        return self.room.keep(self.recipe, Operands(x), self._inward(m))

    def backward(self, operands: Operands, kept: Kept, dy: Tensor, of_mask: bool) -> Gradients:
        return self.room.backward(self.recipe, operands, kept, dy, of_mask=of_mask)

    def statistics(self, x: Tensor, mask: Tensor | None) -> Moments:
        return self.room.statistics(self.recipe, Operands(x, mask)).outward(self.sets)

    def apply(self, operands: Operands, m: Moments) -> Tensor:
        return self.room.apply(self.recipe, operands, self._inward(m))

    def backward_sums(self, operands: Operands, m: Moments, dy: Tensor) -> Sums:
        sums = self.room.backward_sums(self.recipe, operands, self._inward(m), dy)
        return Sums(self.sets.outward(sums.grad), self.sets.outward(sums.grad_xhat), sums.weight, sums.bias)

    def backward_dx(
        self, operands: Operands, m: Moments, dy: Tensor | None, sums: Sums | None
    ) -> tuple[Tensor, Tensor | None]:
        if sums is not None:
            grad, grad_xhat = (self.sets.inward(t.expand(self.sets.shape)) for t in sums[:2])
            sums = Sums(grad, grad_xhat, None, None)
        return self.room.backward_dx(self.recipe, operands, self._inward(m), dy, sums)

    def gradients_of_moments(self, m: Moments, sums: Sums) -> tuple[Tensor | None, ...]:
        return aten.backward_moments(self.recipe, m, sums)

    def sums_of_changed(self, used: Moments, own: Moments, dmean: Tensor | None, dm2: Tensor | None) -> Sums:
        return _sums_of_changed(self.recipe, used, own, dmean, dm2)

    def composed(self, operands: Operands) -> Composed:
        return Composed(self.recipe, cast(Room, aten))

    def _inward(self, m: Moments) -> Moments:
        return each(self.sets.inward, m)


How = Bound | Composed


def _sums_of_changed(rule: Any, used: Moments, own: Moments, dmean: Tensor | None, dm2: Tensor | None) -> Sums:
    dmean, dm2 = (torch.zeros_like(own.mean) if d is None else d for d in (dmean, dm2))
    return aten.backward_statistics(rule, used, dmean, dm2, own)


def moments_of(x: Tensor, kept: Sequence[Any]) -> Moments:
    """The moments that the library has written side by side."""
    mean, low, m2 = kept[0].unbind()
    count = kept[1] if kept[1] is not None else torch.full(mean.shape, x.numel() // mean.numel(), device=mean.device)
    return Moments(count, mean, m2, low)


def _answer(found: Any) -> Any:
    if found is None:
        raise Closer
    return found


def itself(y: Tensor) -> Tensor:
    """The same result, and not a view of a hidden tensor, because `nn.ReLU(inplace=True)` may change it."""
    if not y._is_view():
        return y
    same: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return same


def any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd asks for the gradient of one."""
    for t in tensors:  # noqa: SIM110  # any() of a generator takes twice the time, at every call
        if t is not None and t.requires_grad:
            return True
    return False


def seen_through(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody has to see the operations themselves, so that nothing may hide them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return True
    for t in tensors:
        if t is not None and (
            t.is_neg() or _batched(t) or (type(t) is not Tensor and type(t) is not torch.nn.Parameter)
        ):
            return True  # a lazy minus sign is not in memory, and who knows what a subclass means
    return derived(tensors)


def derived(tensors: Iterable[Tensor | None]) -> bool:
    """Whether torch.func or forward mode is at work: an operator or an autograd Function would give the derivative
    zero, silently."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]
        for t in tensors
    )


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


class OneVariance:
    """A `Whole`: the sets along the last axis have means of their own and one variance, the sum of theirs.

    Real and imaginary part of complex numbers are such sets, and the channels of PairNorm.
    """

    def moments(self, part: Moments) -> Moments:
        return Moments(part.count, part.mean, _total(part.m2), part.low)

    def sums(self, part: Sums) -> Sums:
        return Sums(part.grad, _total(part.grad_xhat), part.weight, part.bias)


def _total(t: Tensor) -> Tensor:
    if type(_KERNELS) is not str and t.is_cpu and unwatched(t) and not (torch.is_grad_enabled() and t.requires_grad):
        found: Tensor | None = _KERNELS.totals(t)
        if found is not None:
            return found
    return t.sum(-1, keepdim=True).expand(t.shape)


def is_share(share: Tensor, mean: Tensor) -> bool:
    """Whether it lies over axes of the statistics."""
    sizes = zip(share.shape[::-1], mean.shape[::-1], strict=False)
    return share.dim() <= mean.dim() and all(size in (1, of_sets) for size, of_sets in sizes)


def about(how: How, own: Moments, share: Tensor) -> Moments:
    """The moments about a share of the mean."""
    if type(how) is not Bound:
        return own.about(share)
    found = _KERNELS.about(own.count, own.mean, own.m2, own.low, share)
    if found is None:
        if not is_share(share, own.mean):
            raise Closer
        return own.about(share)
    return Moments(own.count, *found)


def corrected(m: Moments, correction: float) -> Moments:
    """The moments by which x is divided by the root of M2 / (count - correction); of sets with no more: of nothing."""
    if m.count.is_floating_point():
        raise SpecError(
            say(
                "a correction is for numbers of elements, and weights do not count elements",
                received=f"correction={correction}, counts of {m.count.dtype}",
                instead="correction=0, or a bool mask",
            )
        )
    enough = m.count > correction
    return Moments(m.count.where(enough, 0), m.mean, m.m2 * _larger_by(m.count, correction).to(m.m2.dtype), m.low)


def _larger_by(count: Tensor, correction: float) -> Tensor:
    """count / (count - correction), and 0 where there is no more."""
    rest = count.double() - correction
    enough = rest > 0
    return (count / rest.where(enough, 1)).where(enough, 0.0)


class Step(NamedTuple):
    """The step over sets: what is done with moments between the passes over x, and with sums on the way back.

    Forward, the moments are merged with the other parts of their sets. Then a share a of the mean m takes its place:

        y = (x - a m) / s            s^2 = var + (1 - a)^2 m^2 + eps

    Backward, with G = sum of g and Gy = sum of g y over a set of n elements:

        dx = (g - (a / n) (G - Gy (1 - a) m / s) - y Gy / n) / s
        da = (Gy (1 - a) m / s - G) m / s

    Source: Cai et al., "GraphNorm: A Principled Approach to Accelerating Graph Neural Network Training", 2020.

    A correction c makes var = M2 / (n - c). Then Gy / (n - c) takes the place of Gy / n.

    Args:
        wholes: the merges, in order.
        needed: any rank needs the gradient of x.
        correction: c; sets of c elements or fewer have the result 0.
    """

    wholes: Sequence[Whole] = ()
    needed: bool = True
    correction: float = 0

    def merged(self, part: Moments) -> Moments:
        """The moments of the whole sets."""
        for whole in self.wholes:
            part = whole.moments(part)
        return part

    def used(self, how: How, own: Moments, share: Tensor | None) -> Moments:
        """The moments that x is normalized by."""
        used = corrected(own, self.correction) if self.correction else own
        return used if share is None else about(how, used, share)

    def back(
        self, how: How, own: Moments, used: Moments, share: Tensor | None, sums: Sums
    ) -> tuple[Sums, Tensor | None]:
        """The sums of the whole sets, as `backward_dx` takes them, and the gradient of the share."""
        rule = how.options
        dshare = None
        if share is not None and not self.wholes and type(how) is Bound and not torch.is_grad_enabled():
            given = (own.count, own.mean, used.m2, share, sums.grad, sums.grad_xhat, float(rule.eps), rule.scale)
            found = _KERNELS.share_backward(*given)
            if found is not None:
                return Sums(found[0], sums.grad_xhat, sums.weight, sums.bias), found[1]
        if share is not None:
            scaled, rest = own.mean * aten.inverse_sigma(rule, used), -sums.grad
            if rule.scale:
                rest = rest + sums.grad_xhat * (1 - share) * scaled
            dshare = (rest * scaled).sum_to_size(share.shape)
            sums = Sums(-share * rest, sums.grad_xhat, sums.weight, sums.bias)
        if self.correction:
            sums = Sums(
                sums.grad,
                sums.grad_xhat * _larger_by(own.count, self.correction).to(sums.grad_xhat.dtype),
                sums.weight,
                sums.bias,
            )
        for whole in self.wholes if self.needed else ():
            sums = whole.sums(sums)
        return sums, dshare


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
