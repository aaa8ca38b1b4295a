"""The autograd Functions of a call, and the two ways in which it is computed: bound by the library, or by a backend.

Moments and sums over sets have the shape that the pattern writes, here and everywhere above.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

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

    def same_sets(self, other: Any, x: Tensor) -> bool:
        """Whether these are the sets of the other call with the same x."""
        if not isinstance(other, Bound):
            return False
        a, b, read = self.formula.spec, other.formula.spec, _KERNELS.sizes
        if a.x != b.x or a.sets != b.sets or read(self.pattern, x) != read(other.pattern, x):
            return False
        return all(self.labels.get(each.label) is other.labels.get(each.label) for each in a.sets.lookups())

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

    def same_sets(self, other: Any, x: Tensor) -> bool:
        return isinstance(other, Composed) and self.sets.same(other.sets)

    def composed(self, operands: Operands) -> Composed:
        return Composed(self.recipe, cast(Room, aten))

    def _inward(self, m: Moments) -> Moments:
        return each(self.sets.inward, m)


How = Bound | Composed


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
    """A result that is no view of a tensor which nobody sees: `nn.ReLU(inplace=True)` may stand behind."""
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


class OfWhole(torch.autograd.Function):
    """y and the moments of sets of which a part lies in x: what is merged comes between the passes."""

    @staticmethod
    def forward(
        ctx: Any, how: tuple[Recipe, Room, Sequence[Whole], bool], *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        recipe, room, wholes, _ = ctx.how = how
        given = Operands(*operands)  # type: ignore[arg-type]
        m = merged(recipe, room.statistics(recipe, given), wholes)
        fields = (m.count, m.mean, m.m2, *([] if m.low is None else [m.low]))
        ctx.save_for_backward(*operands, *fields)
        ctx.mark_non_differentiable(*fields)
        return itself(room.apply(recipe, given, m)), *fields

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        recipe, room, wholes, needed = ctx.how
        saved = ctx.saved_tensors
        operands, m = Operands(*saved[:4]), Moments(*saved[4:])
        if torch.is_grad_enabled() or seen_through((dy, saved[0])):  # differentiated again: by the composition
            room, m = aten, merged(recipe, aten.statistics(recipe, operands), wholes)
        sums = room.backward_sums(recipe, operands, m, dy)
        if not needed:
            return (None, None, None, sums.weight, sums.bias)
        for whole in wholes:  # on every rank, if any needs it
            sums = whole.sums(sums)
        return (None, *room.backward_dx(recipe, operands, m, dy, sums), sums.weight, sums.bias)


def merged(recipe: Recipe, m: Moments, wholes: Sequence[Whole]) -> Moments:
    """The moments of the whole sets, in the internal shape."""
    m = expanded(recipe, m)
    for whole in wholes:
        m = whole.moments(m)
    return m


def expanded(recipe: Recipe, m: Moments) -> Moments:
    """The moments in the internal shape, without axes to be broadcast."""
    return each(lambda t: t.expand(recipe.sets.internal_shape), m)


class Statistics(torch.autograd.Function):
    """The moments of x. Saves x, a mask, and the moments."""

    @staticmethod
    def forward(ctx: Any, how: How, x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, ...]:
        m = how.statistics(x, mask)
        ctx.how, ctx.mask, ctx.waiting = how, mask, {}
        fields = (m.count, m.mean, m.m2, m.low)
        ctx.save_for_backward(x, mask, *fields)
        ctx.mark_non_differentiable(*(t for t in (m.count, m.low) if t is not None))
        return fields

    @staticmethod
    def backward(ctx: Any, _: Any, dmean: Tensor, dm2: Tensor, *__: Any) -> tuple[Tensor | None, ...]:
        x, mask, *fields = ctx.saved_tensors
        how, operands = ctx.how, Operands(x, mask)
        task = torch._C._current_graph_task_id()
        own = [key for key in list(ctx.waiting) if key[0] == task]  # other threads may be at other passes
        first, *others = [ctx.waiting.pop(key) for key in own] or [None]
        if torch.is_grad_enabled() or seen_through((dmean, dm2, x)):  # differentiated again: by the composition
            with torch.enable_grad():
                m = how.composed(operands).statistics(x, mask)
                dx = torch.autograd.grad((m.mean, m.m2), (x,), (dmean, dm2), create_graph=True)[0]
            others = [w for w in (first, *others) if w is not None]
        elif first is None:
            sums = aten.backward_statistics(how.options, Moments(*fields), dmean, dm2)
            dx = how.backward_dx(operands, Moments(*fields), None, sums)[0]
        else:
            sums = aten.backward_statistics(first.how.options, first.moments, dmean, dm2, Moments(*fields))
            dx = first.dx(sums)
        for w in others:
            dx = dx + w.dx(None)
        return None, dx, None


class _Waiting(NamedTuple):
    """A gradient of x that is left to `Statistics.backward`, which then goes over x once, and not twice."""

    how: How
    operands: Operands
    moments: Moments
    dy: Tensor

    def dx(self, sums: Sums | None) -> Tensor:
        return self.how.backward_dx(self.operands, self.moments, self.dy, sums)[0]


def statistics_behind(how: How, operands: Operands, external: Moments) -> Any:
    """The node of `Statistics` from which these moments were made, if it is one of the same sets of the same x.

    Its gradient of x goes where that of `Apply` goes, and after it: so one may take the other along. None, if there is
    no such node near.
    """
    x, mask, o = operands.x, operands.mask, how.options
    if not x.requires_grad or o.eps == 0 or not o.center or not o.scale:
        return None
    edge = tuple(torch.autograd.graph.get_gradient_edge(x))[:2]
    nodes = [t.grad_fn for t in (external.mean, external.m2) if t.grad_fn is not None]
    seen, kind = set(nodes), cast(Any, Statistics)._backward_cls
    while nodes and len(seen) < 512:
        node: Any = nodes.pop()
        if isinstance(node, kind):
            if node.mask is mask and node.next_functions[0] == edge and node.how.same_sets(how, x):
                return node
            continue
        new = {after for after, _ in node.next_functions if after is not None and after not in seen}
        seen |= new
        nodes.extend(new)
    return None


class Apply(torch.autograd.Function):
    """Normalizes by moments from elsewhere, to which gradients flow."""

    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[How, Any],
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *fields: Tensor | None,
    ) -> Tensor:
        y = itself(how[0].apply(Operands(x, mask, weight, bias), Moments(*fields)))  # type: ignore[arg-type]
        ctx.how = how
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mask, weight, bias, *fields)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        how, behind = ctx.how
        saved = ctx.saved_tensors
        operands, moments = Operands(*saved[:4]), Moments(*saved[4:])
        if torch.is_grad_enabled() or seen_through((*saved, dy)):
            return Apply._gradients(ctx, how.composed(operands), None, operands, moments, dy)
        try:
            return Apply._gradients(ctx, how, behind, operands, moments, dy)
        except Closer:
            return Apply._gradients(ctx, how.composed(operands), None, operands, moments, dy)

    @staticmethod
    def _gradients(
        ctx: Any, how: How, behind: Any, operands: Operands, moments: Moments, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        sums = Sums(*[None] * 4)  # type: ignore[arg-type]
        if any(needs[3:]):
            sums = how.backward_sums(operands, moments, dy)
        dx = None
        if behind is not None:
            # A pass that computes the gradient of x runs this node. Another pass would leave a tensor behind.
            if torch._C._will_engine_execute_node(behind):
                task = torch._C._current_graph_task_id()
                behind.waiting[task, id(ctx)] = _Waiting(how, operands, each(Tensor.detach, moments), dy)
        elif needs[1]:
            dx = how.backward_dx(operands, moments, dy, None)[0]
        of_moments = aten.backward_moments(how.options, moments, sums) if any(needs[5:]) else (None, None, None)
        return (None, dx, None, sums.weight, sums.bias, *of_moments, None)


class Share(torch.autograd.Function):
    """Subtracts a share of the mean, and divides by the root mean square of what is left.

    With share a, mean m, G = sum of g and Gy = sum of g * y over a set of n elements:

        y = (x - a m) / s            s^2 = var + (1 - a)^2 m^2 + eps
        dx = (g - (a / n) (G - Gy (1 - a) m / s) - y Gy / n) / s
        da = (Gy (1 - a) m / s - G) m / s

    Source: Cai et al., "GraphNorm: A Principled Approach to Accelerating Graph Neural Network Training", 2020.
    """

    @staticmethod
    def forward(ctx: Any, how: Bound, x: Tensor, share: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        own = how.statistics(x, None)
        y = how.apply(Operands(x, None, weight, bias), own.about(share))
        ctx.how = how
        ctx.save_for_backward(x, share, weight, bias, own.count, own.mean, own.m2, own.low)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, share, weight, bias, *fields = ctx.saved_tensors
        how, operands = ctx.how, Operands(x, None, weight, bias)
        if torch.is_grad_enabled() or seen_through((dy, x)):  # differentiated again: by the composition
            with torch.enable_grad():
                # Each by a name of its own: one may lie behind another, as where a layer is applied twice.
                x, share = x.view_as(x), share.view_as(share)
                weight, bias = (None if t is None else t.view_as(t) for t in (weight, bias))
                operands = Operands(x, None, weight, bias)
                composed = how.composed(operands)
                y = composed.apply(operands, composed.statistics(x, None).about(share))
                given = [t for t in (x, share, weight, bias) if t is not None and t.requires_grad]
                found = iter(torch.autograd.grad(y, given, dy, create_graph=True))
            needed = ((t is not None and t.requires_grad) for t in (x, share, weight, bias))
            return (None, *(next(found) if needs else None for needs in needed))
        own = Moments(*fields)
        about = own.about(share)
        sums = how.backward_sums(operands, about, dy)
        rate = aten.inverse_sigma(how.options, about)
        scaled = own.mean * rate
        rest = sums.grad_xhat * (1 - share) * scaled - sums.grad
        dx = how.backward_dx(operands, about, dy, Sums(-share * rest, sums.grad_xhat, None, None))[0]
        return None, dx, (rest * scaled).sum_to_size(share.shape), sums.weight, sums.bias


# These go to C at once. `Function.apply` first asks in Python for torch.func, which takes 5 us. Callers have asked.
normalized = super(torch.autograd.Function, Normalize).apply
measured = super(torch.autograd.Function, Statistics).apply
applied = super(torch.autograd.Function, Apply).apply
shared = super(torch.autograd.Function, Share).apply
# A node calls `apply` of its class, which looks for a `vjp` in Python. This one is the backward itself.
cast(Any, Normalize)._backward_cls.apply = Normalize.backward
