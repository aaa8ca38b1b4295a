"""`normalize` and `moments`: a pattern, a tensor, and what the pattern names, made into one call of a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import complexes, ops
from .arguments import (
    Formula,
    Label,
    Options,
    Param,
    as_partition,
    check_eps,
    inward_moments,
    label_names,
    sort_names,
    spec_along,
    unnamed_axes,
)
from .errors import SpecError, say, shown
from .kernels import ROOMS, Operands, Recipe, Room, Sums, Whole, aten, choose
from .partition import Partition
from .ranks import Ranks, Sharding, is_dtensor
from .spec import Element, Expr, Spec
from .statistics import Moments, each


def normalize(
    x: Tensor,
    pattern: str,
    mask: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    affine: str | None = None,
    center: bool = True,
    scale: bool = True,
    eps: float = 1e-5,
    activation: str | None = None,
    moments: Moments | None = None,
    cumulative: str | None = None,
    sharded: str | Sequence[str] | None = None,
    process_group: Any = None,
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Label] | None = None,
    **names: int | Label,
) -> Tensor:
    r"""Normalizes every set that the pattern names, by the statistics of its own elements.

    For each set S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    with the biased variance. The right side of the pattern names the statistics: its axes index the sets, all other
    axes of x are pooled, as in `einops.reduce(x, pattern, "mean")`, which is the tensor of means.

    Args:
        x: floating or complex tensor with the axes of the pattern's left side. Of complex numbers the mean is complex,
            and the variance is E|x - mean|^2. A DTensor says itself what is sharded.
        pattern: `"n (g c) ... -> n g"`; `"b t c, b t -> b"` with a mask; `"v c -> graph[v] c"` with labels.
        mask: over the axes behind the comma. **bool**: True where an element counts; all others belong to no set, their
            output and their gradient are 0, whatever they hold. **floating**, >= 0: weighs the statistics; every
            element is normalized.
        weight, bias: over the axes that `affine` names.
        affine: axes of weight and bias: `"c"`, `"(g c)"`, `"type[v] c"`.
        center: subtract the mean. Without it the variance is that about zero (RMSNorm).
        scale: divide by the standard deviation.
        eps: added to the variance, in the unit of x squared.
        activation: "relu", "silu" or "gelu", applied to the result.
        moments: statistics to use instead of x's own, shaped as the right side of the pattern; a floating mask, which
            would weigh x's own, then says nothing.
        cumulative: a pooled axis, as time: every place along it is normalized by the statistics up to and with it. The
            moments have it as their last axis.
        sharded: axes of x, `"n"`, that are spread over the ranks of a process group: where they are pooled, moments are
            merged across ranks. All ranks make the call; ids of labels are global. The gradient of x is that of the
            sum of all ranks' losses; those of weight and bias are of this rank's part of x.
        process_group: of `torch.distributed`; None is the default one.
        sizes: sizes of axes and compositions, for those that cannot be keywords: `{"(g c)": 64}`.
        labels: labels that cannot be keywords.
        **names: sizes of axes (`g=32`), and labels: a tensor of ids, or a `Partition`.

    Returns:
        A tensor of x's shape, dtype and memory format. A set of one element or of equal values gives exactly 0 (then
        bias), a set of total weight 0 gives 0 (then bias).

    Raises:
        SpecError: the pattern, a name or an option means nothing.
        ShapeError: x, mask, label or parameter does not fit the pattern.
        RuntimeError: with `sharded`, there is no process group, or another rank has failed.

    >>> x = torch.tensor([[1.0, 3.0, 10.0, 30.0]])
    >>> normalize(x, "n (g c) -> n g", g=2, eps=0)
    tensor([[-1.,  1., -1.,  1.]])
    >>> normalize(x, "n c -> n kind[c]", kind=torch.tensor([0, 1, 0, 1]), eps=0)
    tensor([[-1., -1.,  1.,  1.]])
    >>> mask = torch.tensor([[True, True, False, False]])
    >>> normalize(x, "n c, n c -> n", mask, eps=0)
    tensor([[-1.,  1.,  0.,  0.]])

    Source: Wu and He, "Group Normalization", 2018, with any partition of the elements in place of groups of channels.
    """
    options = Options(center, scale, eps, activation)
    if sharded is None and process_group is None and _compiling(x):
        stages = [] if affine is None and weight is None and bias is None else [(weight, bias)]
        return ops.called(x, pattern, mask, stages, affine, options, moments, cumulative, sizes, labels, names)
    spec = Spec.parse(pattern)
    params = None if affine is None else spec.read(affine, "affine")
    ranks = ALONE
    if sharded is not None or process_group is not None:
        ranks = ranks_of(spec, sharded, process_group, cumulative)
        ranks = ALONE if moments is not None else ranks
    with ranks:
        told, partitions = _names(spec, params, sizes, labels, names)
        check_eps(spec, eps, told, partitions)
        if params is None and (weight is not None or bias is not None):
            raise unnamed_axes(spec, weight, bias)
        if cumulative is not None:
            spec = spec_along(spec, cumulative)
        formula = _formula(spec, options, params, tuple(told.items()))
        given = (x, mask, () if params is None else ((weight, bias),), moments, partitions)
        return run(formula, *given, cumulative=cumulative is not None, ranks=ranks)[0]


def moments(
    x: Tensor,
    pattern: str,
    mask: Tensor | None = None,
    *,
    sharded: str | Sequence[str] | None = None,
    process_group: Any = None,
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Label] | None = None,
    **names: int | Label,
) -> Moments:
    """Count, mean and M2 of every set that the pattern names, shaped as its right side says.

    They merge (`m.merge(other)`, `m.coarsen("n c -> n")`) and are what `normalize(..., moments=m)` takes: statistics of
    tiles, of streams, of another tensor. Differentiable. Arguments and errors are those of `normalize`.

    >>> m = moments(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), "n c -> n")
    >>> m.mean, m.var, m.count
    (tensor([2., 6.]), tensor([1., 1.]), tensor([2, 2]))
    """
    if sharded is None and process_group is None and _compiling(x):
        return ops.called_moments(x, pattern, mask, sizes, labels, names)
    spec = Spec.parse(pattern)
    ranks = ALONE if sharded is None and process_group is None else ranks_of(spec, sharded, process_group)
    with ranks:
        told, partitions = _names(spec, None, sizes, labels, names)
        formula = _formula(spec, Options(), None, tuple(told.items()))
        return own_moments(formula, x, mask, partitions, ranks)


def ranks_of(
    spec: Spec, sharded: str | Sequence[str] | None, process_group: Any, cumulative: str | None = None
) -> Ranks:
    """The ranks that a call is made on together."""
    if sharded is not None:
        return Sharding(spec, sharded, process_group, cumulative).ranks()
    rule, received = "a process group is one of sharded axes", f"process_group={shown(process_group)}, sharded=None"
    raise SpecError(say(rule, text=spec.text, received=received, instead='sharded="n", say'))


def _formula(spec: Spec, options: Options, params: Expr | None, sizes: tuple[tuple[str, int], ...]) -> Formula:
    """The same formula for the same arguments, as it keeps what is worked out for them."""
    if torch.compiler.is_compiling():
        return _kept_formula.__wrapped__(spec, options, params, sizes)
    return _kept_formula(spec, options, params, sizes)


@lru_cache(maxsize=1024)
def _kept_formula(spec: Spec, options: Options, params: Expr | None, sizes: tuple[tuple[str, int], ...]) -> Formula:
    return Formula(spec, options, () if params is None else (params,), dict(sizes))


def _names(
    spec: Spec,
    params: Expr | None,
    sizes: Mapping[str, int] | None,
    labels: Mapping[str, Label] | None,
    names: Mapping[str, int | Label],
) -> tuple[dict[str, int], dict[str, Partition]]:
    told, found = sort_names(spec, [params], sizes, labels, names)
    read = label_names(spec, params)
    return told, {name: as_partition(*read[name], value) for name, value in found.items()}


# --- from a recipe to a kernel ---------------------------------------------------------------------------------------

ALONE = Ranks([])


def run(
    formula: Formula,
    x: Tensor,
    mask: Tensor | None,
    params: Sequence[Param],
    moments: Moments | None,
    labels: Mapping[str, Partition],
    *,
    tracked: bool = False,
    apart: bool = False,
    cumulative: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Moments | None]:
    """The one way from arguments to a result: prepare, plan, compute. With `tracked`, the moments used, too.

    With `apart`, these are computed by themselves, and differentiable. With `cumulative`, the last axis of the
    statistics is one that they are cumulated along.
    """
    if _compiling(x, ranks):
        how = {"tracked": tracked, "apart": apart, "cumulative": cumulative}
        return ops.run(formula, x, mask, params, moments, labels, **how)
    if moments is None and (apart or cumulative):
        if ranks.groups:  # nothing may raise on one rank alone once the moments have gone around
            formula.prepare(x, mask, params, labels)
        elif type(x) is not Tensor and is_dtensor(x):
            _check_placed(formula, x, mask, params, labels)
        moments = own_moments(formula, x, mask, labels, ranks)
        moments = moments.cumulative() if cumulative else moments
    if type(x) is not Tensor and is_dtensor(x):
        return _placed(formula, x, mask, params, moments, labels, tracked=tracked)
    if isinstance(x, Tensor) and x.is_complex():
        return _complex(formula, x, mask, params, moments, labels, ranks)
    recipe, operands = formula.prepare(x, mask, params, labels)
    if ranks.groups and moments is None:
        return _of_whole(recipe, operands, ranks, (ranks,))
    tensors: Sequence[Tensor | None] = operands
    external = None
    if moments is not None:
        external = inward_moments(formula.spec.sets, recipe, moments, x)
        tensors = (*operands, external.count, external.mean, external.m2)
    differentiated = torch.is_grad_enabled() and _any_requires_grad(tensors)
    transformed = _seen_through(tensors)
    origin = "given" if external is not None else "asked for" if tracked else None
    plan = choose(recipe, operands, differentiated=differentiated, transformed=transformed, moments=origin)
    room = ROOMS[plan.room]
    if differentiated and not transformed:
        if external is not None:
            fields = (external.count, external.mean, external.m2, external.low)
            behind = _statistics_behind(recipe, operands, external)
            return _Apply.apply((recipe, room, behind), *operands, *fields), moments  # type: ignore[no-untyped-call]
        if not tracked:
            return _Normalize.apply((recipe, room, False), *operands), None  # type: ignore[no-untyped-call]
        y, *kept = _Normalize.apply((recipe, room, True), *operands)  # type: ignore[no-untyped-call]
        return y, room.moments(recipe, operands, tuple(kept)).outward(recipe.sets)
    if external is not None:
        return room.apply(recipe, operands, external), moments
    if not tracked:
        return room.evaluate(recipe, operands), None
    y, kept = room.forward(recipe, operands)
    return y, room.moments(recipe, operands, kept).outward(recipe.sets)


def own_moments(
    formula: Formula,
    x: Tensor,
    mask: Tensor | None,
    labels: Mapping[str, Partition],
    ranks: Ranks = ALONE,
) -> Moments:
    """The moments of x, differentiable."""
    if _compiling(x, ranks):
        return ops.moments(formula, x, mask, labels)
    formula = formula.of_moments  # here: dynamo knows no lock, as cached_property has before 3.12
    labels = {name: labels[name] for name in formula.lookups if name in labels}
    if type(x) is not Tensor and is_dtensor(x):
        from .dtensors import Placed

        placed = Placed(formula, cast(Any, x))
        with Ranks(placed.ranks.groups, replicated=True) as ranks:  # what becomes of the moments, all compute alike
            where, here = placed.labels(labels), placed.local(mask, _mask_axes(formula))
            m = own_moments(placed.formula, placed.x.to_local(), here, where, ranks)
        return placed.all_moments(m)
    if isinstance(x, Tensor) and x.is_complex():
        formula.prepare(x, mask, (), labels)
        return own_moments(complexes.in_parts(formula), complexes.parts(x), mask, labels, ranks).joined()
    recipe, operands = formula.prepare(x, mask, (), labels)
    differentiated = torch.is_grad_enabled() and _any_requires_grad((x, mask))
    if ranks.groups:
        ranks.agree(recipe, x.dtype, differentiated=differentiated, needed=differentiated)
    seen = _seen_through((x, mask)) or (differentiated and mask is not None and mask.requires_grad)
    plan = choose(recipe, operands, differentiated=differentiated, transformed=seen, moments="asked for")
    room: Room = ROOMS[plan.room]
    if differentiated and not seen and plan.room != "aten":
        found = Moments(*_Statistics.apply((recipe, room), x, mask))  # type: ignore[no-untyped-call]
    else:
        found = room.statistics(recipe, operands)
    if ranks.groups:
        found = ranks.moments(_expanded(recipe, found))
    return found.outward(recipe.sets)


ops.eager = ops._Eager(run, own_moments)

# --- sets that go on elsewhere ---------------------------------------------------------------------------------------


def _of_whole(recipe: Recipe, operands: Operands, ranks: Ranks, wholes: Sequence[Whole]) -> tuple[Tensor, Moments]:
    """y and the moments, of sets of which a part lies in x."""
    differentiated = torch.is_grad_enabled() and _any_requires_grad(operands)
    needed = differentiated and _any_requires_grad(operands[:2])
    needed = ranks.agree(recipe, operands.x.dtype, differentiated=differentiated, needed=needed)
    # Of weights, the kernels know the derivative of a variance that is theirs alone.
    shared = wholes[-1] is not ranks and operands.mask is not None and operands.mask.requires_grad
    transformed = _seen_through(operands) or (differentiated and shared)
    plan = choose(recipe, operands, differentiated=differentiated, transformed=transformed, moments="asked for")
    room: Room = ROOMS[plan.room]
    if differentiated and not transformed:
        y, *fields = _OfWhole.apply((recipe, room, wholes, needed), *operands)  # type: ignore[no-untyped-call]
        return y, Moments(*fields).outward(recipe.sets)
    m = _merged(recipe, room.statistics(recipe, operands), wholes)
    return room.apply(recipe, operands, m), m.outward(recipe.sets)


def _merged(recipe: Recipe, m: Moments, wholes: Sequence[Whole]) -> Moments:
    m = _expanded(recipe, m)
    for whole in wholes:
        m = whole.moments(m)
    return m


def _expanded(recipe: Recipe, m: Moments) -> Moments:
    return each(lambda t: t.expand(recipe.sets.internal_shape), m)


def _complex(
    formula: Formula,
    x: Tensor,
    mask: Tensor | None,
    params: Sequence[Param],
    moments: Moments | None,
    labels: Mapping[str, Partition],
    ranks: Ranks,
) -> tuple[Tensor, Moments | None]:
    """Of real and imaginary part, which share a variance; then weight and bias, which may be complex."""
    recipe, operands = formula.prepare(x, mask, params, labels)
    halves = complexes.in_parts(formula)
    inner, of_parts = halves.prepare(complexes.parts(x), mask, (), labels)
    if moments is None:
        both: Whole = complexes.BothParts()
        wholes = (ranks, both) if ranks.groups else (both,)
        y, used = _of_whole(inner, of_parts, ranks, wholes)
    else:
        moments.check()
        about = moments if formula.options.center else moments.about(0)  # of both parts, before they are added
        used = complexes.BothParts().moments(about.parts())
        y, _ = run(halves, of_parts.x, mask, (), used, labels)
    y = aten.affine_only(recipe, operands, complexes.joined(y))
    return y, complexes.of_both(used) if moments is None else moments


def _placed(
    formula: Formula,
    x: Any,
    mask: Tensor | None,
    params: Sequence[Param],
    moments: Moments | None,
    labels: Mapping[str, Partition],
    *,
    tracked: bool,
) -> tuple[Tensor, Moments | None]:
    """Of a DTensor: what lies here, with the ranks that sets go on over."""
    from .dtensors import Placed

    placed = Placed(formula, x)
    with placed.ranks if moments is None else ALONE as ranks:
        y, used = run(
            placed.formula,
            placed.x.to_local(),
            placed.local(mask, _mask_axes(formula)),
            placed.params(params),
            placed.moments(moments),
            placed.labels(labels),
            tracked=tracked,
            ranks=ranks,
        )
    own = tracked and moments is None and used is not None
    return placed.result(y), placed.all_moments(cast(Moments, used)) if own else moments


def _check_placed(
    formula: Formula, x: Any, mask: Tensor | None, params: Sequence[Param], labels: Mapping[str, Partition]
) -> None:
    """Raises what is wrong here, and so on all ranks, which are about to agree on the moments."""
    from .dtensors import Placed

    placed = Placed(formula, x)
    try:
        here, where = placed.local(mask, _mask_axes(formula)), placed.labels(labels)
        placed.formula.prepare(placed.x.to_local(), here, placed.params(params), where)
    except Exception:  # whatever it is: raised inside of the block, it is told to the others
        with placed.ranks:
            raise


def _mask_axes(formula: Formula) -> Sequence[Element]:
    return () if formula.spec.mask is None else formula.spec.mask.elements


def _compiling(x: Tensor, ranks: Ranks = ALONE) -> bool:
    """Whether an operator goes into a graph. Exported graphs hold operations that everybody knows.

    It is the operator always: on 2 cores torch.compile of the composition took 119 ms for GroupNorm of 16x256x56x56 and
    52 ms for LayerNorm of 32x512x768, where the operator took 26 and 11.
    """
    if not torch.compiler.is_dynamo_compiling() or ranks.groups:
        return False
    return type(x) is Tensor or not is_dtensor(x)


def _any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    for t in tensors:  # noqa: SIM110  # any() of a generator takes twice the time, at every call
        if t is not None and t.requires_grad:
            return True
    return False


def _seen_through(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody has to see the operations themselves, so that nothing may hide them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for t in tensors:
        if t is not None and (t.is_neg() or (type(t) is not Tensor and type(t) is not torch.nn.Parameter)):
            return True  # a lazy minus sign is not in memory, and who knows what a subclass means
    return _derived(tensors)


def _derived(tensors: Iterable[Tensor | None]) -> bool:
    """Whether torch.func or forward mode is at work: an operator or an autograd Function would give the derivative
    zero, silently."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]
        for t in tensors
    )


def _itself(y: Tensor) -> Tensor:
    """A result that is no view of a tensor which nobody sees: `nn.ReLU(inplace=True)` may stand behind."""
    if not y._is_view():
        return y
    same: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return same


class _Normalize(torch.autograd.Function):
    """Saves x, the user's own operands and what the room keeps of the sets; nothing else of x's size."""

    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Recipe, Room, bool],  # one argument, as each takes a third of a microsecond
        *operands: Tensor | None,
    ) -> Tensor | tuple[Tensor, ...]:
        recipe, room, tracked = ctx.how = how
        y, kept = room.forward(recipe, Operands(*operands))  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *kept)
        if not tracked:
            return _itself(y)
        ctx.mark_non_differentiable(*kept)
        return _itself(y), *kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        recipe, room, _ = ctx.how
        saved = ctx.saved_tensors  # asked for once: checkpointing unpacks each time
        operands, kept = Operands(*saved[:4]), saved[4:]
        if torch.is_grad_enabled() or _seen_through((dy, saved[0])):  # differentiated again: by the composition
            room, kept = aten, aten.forward(recipe, operands)[1]  # of moments that depend on x
        needs = ctx.needs_input_grad
        if needs[1] or needs[2]:
            return (None, *room.backward(recipe, operands, kept, dy, of_mask=needs[2]))
        sums = room.backward_sums(recipe, operands, room.moments(recipe, operands, kept), dy)
        return (None, None, None, sums.weight, sums.bias)


class _OfWhole(torch.autograd.Function):
    """y and the moments of sets of which a part lies in x: what is merged comes between the passes."""

    @staticmethod
    def forward(
        ctx: Any, how: tuple[Recipe, Room, Sequence[Whole], bool], *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        recipe, room, wholes, _ = ctx.how = how
        given = Operands(*operands)  # type: ignore[arg-type]
        m = _merged(recipe, room.statistics(recipe, given), wholes)
        fields = (m.count, m.mean, m.m2, *([] if m.low is None else [m.low]))
        ctx.save_for_backward(*operands, *fields)
        ctx.mark_non_differentiable(*fields)
        return _itself(room.apply(recipe, given, m)), *fields

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        recipe, room, wholes, needed = ctx.how
        saved = ctx.saved_tensors
        operands, m = Operands(*saved[:4]), Moments(*saved[4:])
        if torch.is_grad_enabled() or _seen_through((dy, saved[0])):  # differentiated again: by the composition
            room, m = aten, _merged(recipe, aten.statistics(recipe, operands), wholes)
        sums = room.backward_sums(recipe, operands, m, dy)
        if not needed:
            return (None, None, None, sums.weight, sums.bias)
        for whole in wholes:  # on every rank, if any needs it
            sums = whole.sums(sums)
        return (None, *room.backward_dx(recipe, operands, m, dy, sums), sums.weight, sums.bias)


class _Statistics(torch.autograd.Function):
    """The moments of x. Saves x, a mask, and the moments."""

    @staticmethod
    def forward(ctx: Any, how: tuple[Recipe, Room], x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, ...]:
        recipe, room = ctx.how = how
        ctx.mask, ctx.waiting = mask, {}
        m = room.statistics(recipe, Operands(x, mask))
        fields = (m.count, m.mean, m.m2, m.low)
        ctx.save_for_backward(x, mask, *fields)
        ctx.mark_non_differentiable(*(t for t in (m.count, m.low) if t is not None))
        return fields

    @staticmethod
    def backward(ctx: Any, _: Any, dmean: Tensor, dm2: Tensor, *__: Any) -> tuple[Tensor | None, ...]:
        recipe, room = ctx.how
        x, mask, *fields = ctx.saved_tensors
        task = torch._C._current_graph_task_id()
        first, *others = [w for w in ctx.waiting.values() if w.task == task] or [None]
        ctx.waiting = {}
        if torch.is_grad_enabled() or _seen_through((dmean, dm2, x)):  # differentiated again: by the composition
            with torch.enable_grad():
                m = aten.statistics(recipe, Operands(x, mask))
                dx = torch.autograd.grad((m.mean, m.m2), (x,), (dmean, dm2), create_graph=True)[0]
            others = [w for w in (first, *others) if w is not None]
        elif first is None:
            sums = aten.backward_statistics(recipe, Moments(*fields), dmean, dm2)
            dx = room.backward_dx(recipe, Operands(x, mask), Moments(*fields), None, sums)[0]
        else:
            sums = aten.backward_statistics(first.recipe, first.moments, dmean, dm2, Moments(*fields))
            dx = first.dx(sums)
        for w in others:
            dx = dx + w.dx(None)
        return None, dx, None


class _Waiting(NamedTuple):
    """A gradient of x that is left to `_Statistics.backward`, which then goes over x once, and not twice."""

    task: int  # the backward pass
    recipe: Recipe
    room: Room
    operands: Operands
    moments: Moments
    dy: Tensor

    def dx(self, sums: Sums | None) -> Tensor:
        return self.room.backward_dx(self.recipe, self.operands, self.moments, self.dy, sums)[0]


def _statistics_behind(recipe: Recipe, operands: Operands, external: Moments) -> Any:
    """The node of `_Statistics` from which these moments were made, if it is one of the same sets of the same x.

    Its gradient of x goes where that of `_Apply` goes, and after it: so one may take the other along. None, if there is
    no such node near.
    """
    x, mask = operands.x, operands.mask
    if not x.requires_grad or recipe.eps == 0 or not recipe.center or not recipe.scale:
        return None
    edge = tuple(torch.autograd.graph.get_gradient_edge(x))[:2]
    nodes = [t.grad_fn for t in (external.mean, external.m2) if t.grad_fn is not None]
    seen, kind = set(nodes), cast(Any, _Statistics)._backward_cls
    while nodes and len(seen) < 512:
        node: Any = nodes.pop()
        if isinstance(node, kind):
            if node.mask is mask and node.next_functions[0] == edge and node.how[0].sets.same(recipe.sets):
                return node
            continue
        new = {after for after, _ in node.next_functions if after is not None and after not in seen}
        seen |= new
        nodes.extend(new)
    return None


class _Apply(torch.autograd.Function):
    """Normalizes by moments from elsewhere, to which gradients flow."""

    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Recipe, Room, Any],
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *fields: Tensor | None,
    ) -> Tensor:
        recipe, room, _ = ctx.how = how
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mask, weight, bias, *fields)
        return _itself(room.apply(recipe, Operands(x, mask, weight, bias), Moments(*fields)))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        recipe, room, behind = ctx.how
        saved = ctx.saved_tensors
        operands, moments = Operands(*saved[:4]), Moments(*saved[4:])
        if torch.is_grad_enabled() or _seen_through((*saved, dy)):
            room, behind = aten, None
        sums = room.backward_sums(recipe, operands, moments, dy)
        dx = None
        if behind is not None:
            task = torch._C._current_graph_task_id()
            behind.waiting[id(ctx)] = _Waiting(task, recipe, room, operands, each(Tensor.detach, moments), dy)
        elif ctx.needs_input_grad[1]:
            dx = room.backward_dx(recipe, operands, moments, dy, None)[0]
        return (None, dx, None, sums.weight, sums.bias, *aten.backward_moments(recipe, moments, sums), None)
