"""`normalize` and `moments`: a pattern, a tensor, and what the pattern names, made into one call of a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import ShapeError, SpecError, say, shown
from ..kernels import ROOMS, Operands, Recipe, Room, Whole, aten, choose, stat_dtype
from ..library import library
from ..partition import Partition
from ..spec import Element, Expr, Spec
from ..statistics import Moments, each
from ..watching import unwatched
from . import complexes, traced
from .arguments import (
    Formula,
    Label,
    Options,
    Param,
    as_partition,
    check_eps,
    label_names,
    outward_moments,
    sort_names,
    spec_along,
    unnamed_axes,
)
from .gradients import (
    Apply,
    Bound,
    Closer,
    Composed,
    Normalize,
    OfWhole,
    Statistics,
    any_requires_grad,
    applied,
    measured,
    merged,
    moments_of,
    normalized,
    seen_through,
    shared,
    statistics_behind,
)
from .ranks import Ranks, Sharding, is_dtensor


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
    if sharded is None and process_group is None:
        if _compiling(x):
            options = Options(center, scale, eps, activation)
            stages = [] if affine is None and weight is None and bias is None else [(weight, bias)]
            return traced.called(x, pattern, mask, stages, affine, options, moments, cumulative, sizes, labels, names)
        asked = None
        if sizes is None and labels is None and cumulative is None and unwatched(x):
            asked = _asked((pattern, affine, center, scale, eps, activation), names)
        if asked is not None and (affine is not None or (weight is None and bias is None)):
            formula, partitions = asked
            stages = [] if affine is None else [(weight, bias)]
            return run(formula, x, mask, stages, moments, partitions)[0]
    options = Options(center, scale, eps, activation)
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
        formula = formula_for(spec, options, params, tuple(told.items()))
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
    if sharded is None and process_group is None:
        if _compiling(x):
            return traced.called_moments(x, pattern, mask, sizes, labels, names)
        if sizes is None and labels is None and unwatched(x):
            asked = _asked((pattern, None, True, True, 1e-5, None), names)
            if asked is not None:
                return own_moments(asked[0], x, mask, asked[1])
    spec = Spec.parse(pattern)
    ranks = ALONE if sharded is None and process_group is None else ranks_of(spec, sharded, process_group)
    with ranks:
        told, partitions = _names(spec, None, sizes, labels, names)
        formula = formula_for(spec, Options(), None, tuple(told.items()))
        return own_moments(formula, x, mask, partitions, ranks)


def ranks_of(
    spec: Spec, sharded: str | Sequence[str] | None, process_group: Any, cumulative: str | None = None
) -> Ranks:
    """The ranks that a call is made on together."""
    if sharded is not None:
        return Sharding(spec, sharded, process_group, cumulative).ranks()
    rule, received = "a process group is one of sharded axes", f"process_group={shown(process_group)}, sharded=None"
    raise SpecError(say(rule, text=spec.text, received=received, instead='sharded="n", say'))


def _asked(text: tuple[Any, ...], names: Mapping[str, Any]) -> tuple[Formula, dict[str, Partition]] | None:
    """The formula that a call asks for, and its labels. None: what was typed has to be looked at more closely."""
    pattern, affine, center, scale, eps, activation = text
    if type(pattern) is not str or type(center) is not bool or type(scale) is not bool or type(eps) is not float:
        return None
    if (affine is not None and type(affine) is not str) or (activation is not None and type(activation) is not str):
        return None
    told = tuple([item for item in names.items() if type(item[1]) is int])
    given = {name: value for name, value in names.items() if type(value) is not int} if told else names
    try:
        formula = _typed(pattern, affine, center, scale, eps, activation, told, tuple(given))
    except (SpecError, ShapeError):  # raised again with the values of labels
        return None
    if any(name in formula.lookups for name, _ in told):  # a number in place of ids
        return None
    return formula, {name: as_partition(*formula.lookups[name], value) for name, value in given.items()}


@lru_cache(maxsize=1024)
def _typed(
    pattern: str,
    affine: str | None,
    center: bool,
    scale: bool,
    eps: float,
    activation: str | None,
    told: tuple[tuple[str, int], ...],
    labels: tuple[str, ...],
) -> Formula:
    """The formula of what was typed, checked once."""
    options, spec = Options(center, scale, eps, activation), Spec.parse(pattern)
    params = None if affine is None else spec.read(affine, "affine")
    sizes, _ = sort_names(spec, [params], None, None, {**dict(told), **dict.fromkeys(labels)})
    check_eps(spec, eps, sizes, labels)
    return formula_for(spec, options, params, tuple(sizes.items()))


def formula_for(spec: Spec, options: Options, params: Expr | None, sizes: tuple[tuple[str, int], ...]) -> Formula:
    """The same formula for the same arguments, because it keeps what is worked out for them.

    Two spellings of a pattern are equal, and yet two formulas: an error shows what this user typed.
    """
    kept = _kept_formula.__wrapped__ if torch.compiler.is_compiling() else _kept_formula
    return kept(spec, options, params, sizes, spec.text, None if params is None else params.text)


@lru_cache(maxsize=1024)
def _kept_formula(
    spec: Spec,
    options: Options,
    params: Expr | None,
    sizes: tuple[tuple[str, int], ...],
    text: str,
    params_text: str | None,
) -> Formula:
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


# --- from a formula to a kernel --------------------------------------------------------------------------------------

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
    """The one way from arguments to a result. With `tracked`, the moments used as well.

    With `apart`, these are computed by themselves, and differentiable. With `cumulative`, the last axis of the
    statistics is one that they are cumulated along.
    """
    if unwatched(x) and not ranks.groups:
        if moments is None and (apart or cumulative):
            moments = own_moments(formula, x, mask, labels)
            moments = moments.cumulative() if cumulative else moments
        kept: list[Any] | None = [] if tracked and moments is None else None
        y = bound(formula, x, mask, params, moments, labels, kept)
        if y is not None:
            return y, moments_of(x, kept) if kept else moments
    return _routed(formula, x, mask, params, moments, labels, tracked, apart, cumulative, ranks)


def bound(
    formula: Formula,
    x: Tensor,
    mask: Tensor | None,
    params: Sequence[Param],
    moments: Moments | None,
    labels: Mapping[str, Partition],
    kept: list[Any] | None = None,
) -> Tensor | None:
    """The result of the library, which binds the pattern to the tensors. None: Python has to look closer.

    `kept` takes what `moments_of` is made of.
    """
    try:
        if len(params) > 1:
            if any(name not in labels for name in formula.lookups):
                return None
            one = formula.of_one_stage(x, params, labels)
            if one is None:
                return None
            formula, params = one
        pattern = formula.patterns[x.dim()]
        groups = formula.packed(labels) if formula.lookups else ()  # in the order in which the pattern reads them
        if pattern is None or groups is None:
            return None
        weight, bias = params[0] if params else (None, None)
        differentiated = torch.is_grad_enabled() and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (mask is not None and mask.requires_grad)
        )
        if moments is not None:
            return _bound_to(Bound(pattern, groups, formula, labels), x, mask, weight, bias, moments, differentiated)
        y: Tensor | None
        if differentiated:
            how = tuple.__new__(Bound, (pattern, groups, formula, labels))  # without the Python of a NamedTuple
            y = normalized(how, kept, x, mask, weight, bias)  # type: ignore[no-untyped-call]
        elif kept is None:
            y = _KERNELS.evaluate(pattern, x, mask, weight, bias, groups)
        else:
            found = _KERNELS.forward(pattern, x, mask, weight, bias, groups)
            if found is None:
                return None
            y = found[0]
            kept.extend(found[1:])
        return y
    except (AttributeError, Closer):  # what is no tensor has no gradient
        return None


def _bound_to(
    how: Bound,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Moments,
    differentiated: bool,
) -> Tensor:
    """The result by moments from elsewhere."""
    if not isinstance(moments, Moments) or moments.mean.is_complex():
        raise Closer
    moments.check()
    differentiated = differentiated or (
        torch.is_grad_enabled() and any_requires_grad((moments.count, moments.mean, moments.m2))
    )
    wide, external = stat_dtype(x.dtype), moments
    if moments.mean.dtype != wide or moments.m2.dtype != wide:
        external = external.rounded(wide)
    if not external.count.is_floating_point() and external.count.dtype != torch.int64:
        external = Moments(external.count.to(torch.int64), external.mean, external.m2, external.low)
    if not differentiated:
        return how.apply(Operands(x, mask, weight, bias), external)
    if not how.options.center:
        external = Moments(external.count, torch.zeros_like(external.mean), external.about_zero())
    operands = Operands(x, mask, weight, bias)
    behind = statistics_behind(how, operands, external)
    fields = (external.count, external.mean, external.m2, external.low)
    y: Tensor = applied((how, behind), *operands, *fields)  # type: ignore[no-untyped-call]
    return y


def _routed(
    formula: Formula,
    x: Tensor,
    mask: Tensor | None,
    params: Sequence[Param],
    moments: Moments | None,
    labels: Mapping[str, Partition],
    tracked: bool,
    apart: bool,
    cumulative: bool,
    ranks: Ranks,
) -> tuple[Tensor, Moments | None]:
    """All other ways: traced, of a DTensor, of complex numbers, over ranks, and by the other backends."""
    if _compiling(x, ranks):
        options = {"tracked": tracked, "apart": apart, "cumulative": cumulative}
        return traced.run(formula, x, mask, params, moments, labels, **options)
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
        external = outward_moments(formula.spec.sets, recipe, moments, x)
        tensors = (*operands, external.count, external.mean, external.m2)
    differentiated = torch.is_grad_enabled() and any_requires_grad(tensors)
    transformed = seen_through(tensors)
    origin = "given" if external is not None else "asked for" if tracked else None
    plan = choose(recipe, operands, differentiated=differentiated, transformed=transformed, moments=origin)
    how = Composed(recipe, ROOMS[plan.room])
    if external is not None:
        if not differentiated or transformed:
            return how.apply(operands, external), moments
        fields = (external.count, external.mean, external.m2, external.low)
        return Apply.apply((how, statistics_behind(how, operands, external)), *operands, *fields), moments  # type: ignore[no-untyped-call]
    if differentiated and not transformed:
        kept: list[Any] | None = [] if tracked else None
        y = Normalize.apply(how, kept, *operands)  # type: ignore[no-untyped-call]
        return y, None if kept is None else how.moments(x, tuple(kept))
    if not tracked:
        return how.room.evaluate(recipe, operands), None
    y, kept_ = how.room.forward(recipe, operands)
    return y, how.moments(x, kept_)


def own_moments(
    formula: Formula,
    x: Tensor,
    mask: Tensor | None,
    labels: Mapping[str, Partition],
    ranks: Ranks = ALONE,
) -> Moments:
    """The moments of x, differentiable."""
    if unwatched(x) and not ranks.groups:
        found = _bound_moments(formula.of_moments, x, mask, labels)
        if found is not None:
            return found
    if _compiling(x, ranks):
        return traced.moments(formula, x, mask, labels)
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
    differentiated = torch.is_grad_enabled() and any_requires_grad((x, mask))
    if ranks.groups:
        ranks.agree(recipe, x.dtype, differentiated=differentiated, needed=differentiated)
    seen = seen_through((x, mask)) or (differentiated and mask is not None and mask.requires_grad)
    plan = choose(recipe, operands, differentiated=differentiated, transformed=seen, moments="asked for")
    how = Composed(recipe, ROOMS[plan.room])
    if differentiated and not seen and plan.room != "aten":
        m = Moments(*Statistics.apply(how, x, mask))  # type: ignore[no-untyped-call]
    else:
        m = how.statistics(x, mask)
    if ranks.groups:
        m = ranks.moments(each(recipe.sets.inward, m)).outward(recipe.sets)
    return m


def _bound_moments(formula: Formula, x: Tensor, mask: Tensor | None, labels: Mapping[str, Partition]) -> Moments | None:
    """The moments that the library computes; None: Python has to look closer."""
    pattern = formula.patterns[x.dim()]
    groups = formula.packed(labels) if formula.lookups else ()
    if pattern is None or groups is None:
        return None
    try:
        if mask is not None and mask.requires_grad:
            return None
        if torch.is_grad_enabled() and x.requires_grad:
            how = Bound(pattern, groups, formula, labels)
            return Moments(*measured(how, x, mask))  # type: ignore[no-untyped-call]
    except (AttributeError, Closer):
        return None
    found = _KERNELS.statistics(pattern, x, mask, None, None, groups)
    return None if found is None else Moments(*found)


def by_share(formula: Formula, x: Tensor, share: Tensor, params: Param, labels: Mapping[str, Partition]) -> Tensor:
    """x about a share of the mean of its own sets, which is over axes of the statistics. See `Share`."""
    if unwatched(x) and x.dtype == stat_dtype(x.dtype) == share.dtype:
        pattern, groups = formula.patterns[x.dim()], formula.packed(labels)
        if pattern is not None and groups is not None:
            try:
                y: Tensor = shared(Bound(pattern, groups, formula, labels), x, share, *params)  # type: ignore[no-untyped-call]
                return y
            except Closer:
                pass
    own = own_moments(formula, x, None, labels)
    stages = [params] if formula.affines else []
    return run(formula, x, None, stages, own.about(share.to(own.mean.dtype)), labels)[0]


_KERNELS: Any = library()  # a text where there is none; then no formula has a pattern

traced.eager = traced._Eager(run, own_moments)

# --- sets that go on elsewhere ---------------------------------------------------------------------------------------


def _of_whole(recipe: Recipe, operands: Operands, ranks: Ranks, wholes: Sequence[Whole]) -> tuple[Tensor, Moments]:
    """y and the moments, of sets of which a part lies in x."""
    differentiated = torch.is_grad_enabled() and any_requires_grad(operands)
    needed = differentiated and any_requires_grad(operands[:2])
    needed = ranks.agree(recipe, operands.x.dtype, differentiated=differentiated, needed=needed)
    # Of weights, the kernels know the derivative of a variance that is theirs alone.
    shared = wholes[-1] is not ranks and operands.mask is not None and operands.mask.requires_grad
    transformed = seen_through(operands) or (differentiated and shared)
    plan = choose(recipe, operands, differentiated=differentiated, transformed=transformed, moments="asked for")
    room: Room = ROOMS[plan.room]
    if differentiated and not transformed:
        y, *fields = OfWhole.apply((recipe, room, wholes, needed), *operands)  # type: ignore[no-untyped-call]
        return y, Moments(*fields).outward(recipe.sets)
    m = merged(recipe, room.statistics(recipe, operands), wholes)
    return room.apply(recipe, operands, m), m.outward(recipe.sets)


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
