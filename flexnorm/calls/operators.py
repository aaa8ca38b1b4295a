"""The entry points of the rooms as operators of torch, `torch.ops.flexnorm.*`: what a compiler puts into its graph.

A graph holds no Python objects, so an operator takes tensors, and its formula as a text. Eager calls go to the rooms
directly, which is many times faster; both run the same kernels.

There are two floors. `normalize`, `tracked` and `moments` are all that dynamo sees: they take what the user gave, and
are made of other operations. So patterns are read, and errors raised, by Python itself, and not by a tracer of Python
that knows half of it. Below are the entry points, which no tracer looks into.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SpecError, say
from ..kernels import ROOMS, Gradients, Operands, Recipe, Sums, aten, choose, stat_dtype
from ..partition import Partition
from ..spec import Spec
from ..statistics import Moments, each
from ..watching import unwatched
from .arguments import Formula, Label, Options, Param, check_eps, outward_moments, sort_names, spec_along, unnamed_axes
from .gradients import Bound, Closer, Composed, How

# One more where the results of an operator have other shapes: compilers keep graphs beyond a process.
SHAPES = 2


def _parsed(text: str) -> tuple[Any, ...]:
    """What the text of an operator says, if a graph of this version holds it."""
    shapes, *said = ast.literal_eval(text)
    if shapes != SHAPES:
        rule, instead = "a compiled or saved graph is run by the version of flexnorm that made it", "compile it again"
        raise SpecError(say(rule, received=f"a graph of another version: {text}", instead=instead))
    return tuple(said)


# --- what dynamo sees ------------------------------------------------------------------------------------------------


def called(
    x: Tensor,
    pattern: str,
    mask: Tensor | None,
    params: Sequence[Param],
    affine: str | None,
    options: Options,
    moments: Moments | None,
    cumulative: str | None,
    sizes: Mapping[str, int] | None,
    labels: Mapping[str, Label] | None,
    names: Mapping[str, int | Label],
) -> Tensor:
    """`functional.normalize`, by an operator: all that is text is read by the operator."""
    head = repr((pattern, () if affine is None else (affine,), (options.center, options.scale, options.activation)))
    told = _told({"sizes": sizes or {}, "labels": labels or {}, "names": names})
    return _normalize(x, mask, params, moments, options.eps, head, told, cumulative)


def called_moments(
    x: Tensor,
    pattern: str,
    mask: Tensor | None,
    sizes: Mapping[str, int] | None,
    labels: Mapping[str, Label] | None,
    names: Mapping[str, int | Label],
    affine: str | None = None,
) -> Moments:
    """`functional.moments`, likewise; `affine` may read labels too."""
    told = _told({"sizes": sizes or {}, "labels": labels or {}, "names": names})
    return _moments(x, mask, repr((pattern, () if affine is None else (affine,), (True, True, None))), told)


def run(
    formula: Formula,
    x: Tensor,
    mask: Tensor | None,
    params: Sequence[Param],
    moments: Moments | None,
    labels: Mapping[str, Partition],
    *,
    tracked: bool,
    apart: bool,
    cumulative: bool,
) -> tuple[Tensor, Moments | None]:
    """`functional.run`, likewise."""
    told = _told({"sizes": dict(formula.sizes), "labels": _those_read(formula, labels)})
    eps = formula.options.eps
    if moments is not None or not (tracked or apart or cumulative):
        return _normalize(x, mask, params, moments, eps, formula.head, told, None), moments
    ids, numbers, keys = told
    text = f"({SHAPES}, {formula.head}, {keys}, {cumulative or None}, {apart})"
    y, *fields = torch.ops.flexnorm.tracked(x, mask, _flat(params), ids, numbers, eps, text)
    return y, Moments(*fields)


def moments(formula: Formula, x: Tensor, mask: Tensor | None, labels: Mapping[str, Partition]) -> Moments:
    """`functional.own_moments`, likewise."""
    told = _told({"sizes": dict(formula.sizes), "labels": _those_read(formula, labels)})
    return _moments(x, mask, formula.head, told)


def _those_read(formula: Formula, labels: Mapping[str, Partition]) -> dict[str, Partition]:
    """A layer may have labels that only its other patterns read."""
    return {name: labels[name] for name in formula.lookups if name in labels}


_Told = tuple[list[Tensor], list[int], str]


def _normalize(
    x: Tensor,
    mask: Tensor | None,
    params: Sequence[Param],
    moments: Moments | None,
    eps: float,
    head: str,
    told: _Told,
    along: str | None,
) -> Tensor:
    ids, numbers, keys = told
    if moments is not None and not isinstance(moments, Moments):
        raise SpecError("moments= takes Moments: moments=flexnorm.moments(x, pattern)")
    fields = [] if moments is None else [moments.count, moments.mean, moments.m2, moments.low]
    text = f"({SHAPES}, {head}, {keys}, {along!r}, False)"
    y: Tensor = torch.ops.flexnorm.normalize(x, mask, _flat(params), ids, numbers, eps, text, moments=fields)
    return y


def _moments(x: Tensor, mask: Tensor | None, head: str, told: _Told) -> Moments:
    ids, numbers, keys = told
    return Moments(*torch.ops.flexnorm.moments(x, mask, ids, numbers, f"({SHAPES}, {head}, {keys}, None, False)"))


def _flat(params: Sequence[Param]) -> list[Tensor | None]:
    return [t for stage in params for t in stage]


def _told(options: Mapping[str, Mapping[str, Any]]) -> _Told:
    """Ids of the labels; the numbers of their values, then sizes; and which of them each is, as text."""
    ids, counts, sizes = [], [], []
    of_labels, of_sizes = [], []
    for option, values in options.items():
        for name, value in values.items():
            label = Partition(value) if isinstance(value, Tensor) else value
            if isinstance(label, Partition):
                ids.append(label._ids)
                counts.append(label.count)
                of_labels.append((option, name))
            elif isinstance(value, int) and not isinstance(value, bool):
                sizes.append(value)
                of_sizes.append((option, name))
            else:
                raise SpecError(f"{name!r} is the size of an axis, or a label: a tensor of ids or a Partition")
    return ids, counts + sizes, repr((of_labels, of_sizes))


# --- a call -----


def written(formula: Formula) -> str:
    """A formula as text. Sizes for which a tracer has symbols stand there by name, and go with the counts."""
    o = formula.options
    affines = tuple(affine.text for affine in formula.affines)
    sizes = tuple(size if type(size[1]) is int else size[0] for size in formula.sizes)
    return repr((SHAPES, formula.spec.text, affines, sizes, (o.center, o.scale, o.eps, o.activation)))


def _read(text: str, numbers: Sequence[int]) -> Formula:
    if all(type(number) is int for number in numbers):
        return _known(text, tuple(numbers))
    return _known.__wrapped__(text, tuple(numbers))  # symbols cannot be kept


@lru_cache(maxsize=1024)
def _known(text: str, numbers: tuple[int, ...]) -> Formula:
    pattern, affines, told, options = _parsed(text)
    names = [size for size in told if isinstance(size, str)]
    sizes = dict(zip(names, numbers[len(numbers) - len(names) :], strict=True))
    sizes = {name: sizes[name] for name in names} | dict(size for size in told if not isinstance(size, str))
    spec = Spec.parse(pattern)
    return Formula(spec, Options(*options), [spec.read(affine, "affine") for affine in affines], sizes)


class _Arguments(NamedTuple):
    """What every entry point takes: ids and counts of the labels are in the order of `Formula.lookups`."""

    x: Tensor
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    labels: Sequence[Tensor]
    counts: Sequence[int]
    formula: str

    @property
    def read(self) -> Formula:
        return _read(self.formula, self.counts)

    @property
    def partitions(self) -> dict[str, Partition]:
        pairs = zip(self.read.lookups, self.labels, self.counts, strict=False)  # sizes come behind the counts
        return {name: Partition._made(ids, count) for name, ids, count in pairs}

    @property
    def operands(self) -> Operands:
        return Operands(self.x, self.mask, self.weight, self.bias)

    def prepare(self) -> Recipe:
        formula = self.read
        params = [(self.weight, self.bias)] if formula.affines else []
        return formula.prepare(self.x, self.mask, params, self.partitions)[0]

    def computed(self, f: Callable[[How, Operands], Any]) -> Any:
        """f of the call as the library computes it, or else as a backend does."""
        formula, partitions = self.read, self.partitions
        if unwatched(self.x):
            pattern, groups = formula.patterns[self.x.dim()], formula.packed(partitions)
            if pattern is not None and groups is not None:
                try:
                    return f(Bound(pattern, groups, formula, partitions), self.operands)
                except Closer:
                    pass
        if self.x.device.type == "cpu":  # elsewhere it is done where a Partition is made
            for partition in partitions.values():
                partition.check()
        recipe = self.prepare()
        plan = choose(recipe, self.operands, differentiated=True)
        return f(Composed(recipe, ROOMS[plan.room]), self.operands)


def _fields(m: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count, mean, M2 and low, each with memory of its own, as results of operators have."""
    count, mean, m2, low = (t.clone(memory_format=_ROWS) for t in (m.count, m.mean, m.m2, _low(m)))
    return count, mean, m2, low


def _present(x: Tensor, *others: Tensor | None) -> list[Tensor]:
    """Those that there are; all but x contiguous, as tracers are told."""
    return [x, *(t.contiguous() for t in others if t is not None)]


def _empty(x: Tensor, *others: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x), *(torch.empty_like(t, memory_format=_ROWS) for t in others if t is not None)]


_ROWS = torch.contiguous_format


# --- the entry points ------------------------------------------------------------------------------------------------

_GIVEN = "Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor[] labels, SymInt[] counts, str formula"
_MOMENTS = "Tensor count, Tensor mean, Tensor m2, Tensor low"
_SCHEMAS = {
    "forward": f"({_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "statistics": f"({_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor)",
    "apply": f"({_GIVEN}, {_MOMENTS}) -> Tensor",
    "cumulative": f"({_MOMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "backward_cumulative": f"({_MOMENTS}, Tensor dcount, Tensor dmean, Tensor dm2) -> Tensor[]",
    "backward": f"({_GIVEN}, {_MOMENTS}, Tensor dy) -> Tensor[]",
    "backward_sums": f"({_GIVEN}, {_MOMENTS}, Tensor dy) -> Tensor[]",
    "backward_dx": f"({_GIVEN}, {_MOMENTS}, Tensor? dy, Tensor? grad, Tensor? grad_xhat) -> Tensor[]",
}


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """y, and the moments."""

    def both(how: How, operands: Operands) -> tuple[Tensor, ...]:
        y, *kept = how.forward(*operands)
        return y, *_fields(how.moments(operands.x, tuple(kept)))

    found: tuple[Tensor, ...] = _Arguments(*arguments).computed(both)
    return found


def _statistics(*arguments: Any) -> tuple[Tensor, ...]:
    m: Moments = _Arguments(*arguments).computed(lambda how, operands: how.statistics(operands.x, operands.mask))
    return _fields(m)


def _apply(*arguments: Any) -> Tensor:
    m = Moments(*arguments[7:])
    y: Tensor = _Arguments(*arguments[:7]).computed(lambda how, operands: how.apply(operands, m))
    return y


def _backward(*arguments: Any) -> list[Tensor]:
    """The gradients of x, of a floating mask, of weight and of bias, of those that there are."""
    *fields, dy = arguments[7:]

    def all_(how: How, operands: Operands) -> Gradients:
        return how.backward(operands, how.keep(operands.x, Moments(*fields)), dy, True)

    return _present(*_Arguments(*arguments[:7]).computed(all_))


def _backward_sums(*arguments: Any) -> list[Tensor]:
    """The sums over the sets, then the gradients of weight and of bias, of those that there are."""
    *fields, dy = arguments[7:]
    m = Moments(*fields)
    sums: Sums = _Arguments(*arguments[:7]).computed(lambda how, operands: how.backward_sums(operands, m, dy))
    grad, grad_xhat = (t.expand(m.mean.shape).clone(memory_format=_ROWS) for t in sums[:2])
    return _present(grad, grad_xhat, *sums[2:])


def _backward_dx(*arguments: Any) -> list[Tensor]:
    """The gradients of x and of a floating mask, if there is one. Without sums the moments do not depend on x."""
    *fields, dy, grad, grad_xhat = arguments[7:]
    sums = None if grad is None else Sums(grad, grad_xhat, None, None)
    m = Moments(*fields)
    return _present(*_Arguments(*arguments[:7]).computed(lambda how, operands: how.backward_dx(operands, m, dy, sums)))


def _cumulative(*fields: Tensor) -> tuple[Tensor, ...]:
    """Along the last axis."""
    m = Moments(*fields).cumulative()
    return tuple(t.clone(memory_format=_ROWS) for t in (m.count, m.mean, m.m2, _low(m)))


def _backward_cumulative(count: Tensor, mean: Tensor, m2: Tensor, low: Tensor, *gradients: Tensor) -> list[Tensor]:
    """Those of mean and m2, and of a floating count. It is computed again."""
    weighed = count.is_floating_point()
    with torch.enable_grad():
        count, mean, m2 = (t.detach().requires_grad_(t.is_floating_point()) for t in (count, mean, m2))
        m = Moments(count, mean, m2, low).cumulative()
        inputs, outputs = [mean, m2] + [count] * weighed, [m.mean, m.m2] + [m.count] * weighed
        found = torch.autograd.grad(outputs, inputs, [*gradients[1:], *gradients[: int(weighed)]])
    return [t.contiguous() for t in found]


# --- what a tracer is told -------------------------------------------------------------------------------------------


def _like_fields(recipe: Recipe, operands: Operands) -> tuple[Tensor, ...]:
    x, mask = operands[:2]
    wide = stat_dtype(x.dtype)
    count = wide if mask is not None and mask.is_floating_point() else torch.int64
    return tuple(x.new_empty(recipe.sets.shape, dtype=dtype) for dtype in (count, wide, wide, wide))


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(arguments[0]), *_fake_statistics(*arguments)


def _fake_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    given = _Arguments(*arguments)
    return _like_fields(given.prepare(), given.operands)


def _fake_apply(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[0])


def _fake_cumulative(*fields: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=_ROWS) for t in fields)


def _fake_backward_cumulative(count: Tensor, mean: Tensor, m2: Tensor, *_: Tensor) -> list[Tensor]:
    of = [mean, m2, count] if count.is_floating_point() else [mean, m2]
    return [torch.empty_like(t, memory_format=_ROWS) for t in of]


def _fake_backward(x: Tensor, mask: Tensor | None, *others: Any) -> list[Tensor]:
    weights = mask if mask is not None and mask.is_floating_point() else None
    return _empty(x, weights, *others[:2])


def _fake_backward_sums(*arguments: Any) -> list[Tensor]:
    _, mean, _, _ = _fake_statistics(*arguments[:7])
    return _empty(mean, mean, *arguments[2:4])


def _fake_backward_dx(x: Tensor, mask: Tensor | None, *others: Any) -> list[Tensor]:
    weights = mask if mask is not None and mask.is_floating_point() and others[-1] is not None else None
    return _empty(x, weights)


_LIBRARY: Any = torch.library.Library("flexnorm", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    # Below autograd, where nothing can be differentiated again: the rooms must not try.
    _LIBRARY.impl(_name, torch.no_grad()(globals()[f"_{_name}"]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"flexnorm::{_name}", globals()[f"_fake_{_name}"], lib=_LIBRARY)


# --- their derivatives -----------------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep_given(ctx, inputs, output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep_given(ctx, inputs, output)
    count, _, _, low = output
    ctx.mark_non_differentiable(*([low] if count.is_floating_point() else [count, low]))


def _keep_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep_given(ctx, inputs[:7], inputs[7:])
    ctx.set_materialize_grads(False)


def _keep_given(ctx: Any, given: tuple[Any, ...], moments: tuple[Tensor, ...]) -> None:
    *operands, labels, counts, formula = given
    ctx.save_for_backward(*operands, *moments, *labels)
    ctx.counts, ctx.formula = counts, formula


def _kept(ctx: Any) -> tuple[tuple[Any, ...], Moments]:
    """What the operator was given, and the moments."""
    x, mask, weight, bias, count, mean, m2, low, *labels = ctx.saved_tensors
    return (x, mask, weight, bias, labels, ctx.counts, ctx.formula), Moments(count, mean, m2, low)


def _gradients(ctx: Any, dx: Any = None, dmask: Any = None, dweight: Any = None, dbias: Any = None) -> tuple[Any, ...]:
    labels = [None] * (len(ctx.saved_tensors) - 8)
    return dx, dmask, dweight, dbias, labels, None if ctx.counts else [], None  # torch takes an empty list for a tree


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dy is None:
        return _gradients(ctx)
    given, m = _kept(ctx)
    return _gradients(ctx, *_each(given, torch.ops.flexnorm.backward(*given, m.count, m.mean, m.m2, m.low, dy)))


def _differentiate_statistics(ctx: Any, dcount: Tensor | None, dmean: Tensor, dm2: Tensor, _: None) -> tuple[Any, ...]:
    given, m = _kept(ctx)
    arguments = _Arguments(*given)
    sums = aten.backward_statistics(arguments.read.options, m, dmean, dm2)
    fields = (m.count, m.mean, m.m2, m.low)
    found = torch.ops.flexnorm.backward_dx(*given, *fields, None, sums.grad, sums.grad_xhat)
    if len(found) == 1:
        return _gradients(ctx, found[0])
    recipe, mask = arguments.prepare(), arguments.mask
    assert recipe.mask is not None
    assert mask is not None
    # That of a mean and a variance. The weight of a set counts by itself, and m2 is so many variances.
    total = dm2 * m.var if dcount is None else dcount + dm2 * m.var
    own = recipe.mask.outward(recipe.mask.sum(recipe.sets.spread(recipe.sets.inward(total)))).to(mask.dtype)
    return _gradients(ctx, found[0], found[1] + own)


def _differentiate_apply(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return *_gradients(ctx), None, None, None, None
    given, m = _kept(ctx)
    fields = (m.count, m.mean, m.m2, m.low)
    grad, grad_xhat, *of_params = torch.ops.flexnorm.backward_sums(*given, *fields, dy)
    dx = torch.ops.flexnorm.backward_dx(*given, *fields, dy, None, None)[0] if ctx.needs_input_grad[0] else None
    _, _, *params = _each((None, None, *given[2:]), [None, *of_params])
    of_moments = aten.backward_moments(_Arguments(*given).read.options, m, Sums(grad, grad_xhat, None, None))
    return *_gradients(ctx, dx, None, *params), *of_moments, None


def _keep_cumulative(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    count, _, _, low = output
    ctx.mark_non_differentiable(*([low] if count.is_floating_point() else [count, low]))


def _differentiate_cumulative(ctx: Any, dcount: Tensor | None, dmean: Tensor, dm2: Tensor, _: None) -> tuple[Any, ...]:
    count, *others = ctx.saved_tensors
    dcount = torch.zeros_like(dmean) if dcount is None else dcount
    dmean, dm2, *of_count = torch.ops.flexnorm.backward_cumulative(count, *others, dcount, dmean, dm2)
    return of_count[0] if of_count else None, dmean, dm2, None


def _each(given: tuple[Any, ...], gradients: Sequence[Any]) -> list[Any]:
    """The gradients of x, of a floating mask, of weight and of bias, None where there is none."""
    _, mask, weight, bias, *_ = given
    found = iter(gradients)
    has = (True, mask is not None and mask.is_floating_point(), weight is not None, bias is not None)
    return [next(found) if there else None for there in has]


for _name, _formula, _setup in (
    ("forward", _differentiate, _keep),
    ("statistics", _differentiate_statistics, _keep_statistics),
    ("apply", _differentiate_apply, _keep_apply),
    ("cumulative", _differentiate_cumulative, _keep_cumulative),
):
    torch.library.register_autograd(f"flexnorm::{_name}", _formula, setup_context=_setup, lib=_LIBRARY)


# --- the floor above -------------------------------------------------------------------------------------------------


def _heard(
    ids: Sequence[Tensor], numbers: Sequence[int], eps: float, text: str
) -> tuple[Formula, dict[str, Partition]]:
    """The formula of a text, and its labels: read and checked as eager calls are."""
    (pattern, affines, (center, scale, activation)), (of_labels, of_sizes), along, _ = _parsed(text)
    options: dict[str, dict[str, Any]] = {"sizes": {}, "labels": {}, "names": {}}
    for (option, name), label, count in zip(of_labels, ids, numbers, strict=False):
        options[option][name] = Partition._made(label, count)
    for (option, name), size in zip(of_sizes, numbers[len(ids) :], strict=True):
        options[option][name] = size
    spec = Spec.parse(pattern)
    axes = [spec.read(affine, "affine") for affine in affines]
    sizes, labels = sort_names(spec, axes, *options.values())
    check_eps(spec, eps, sizes, labels)
    if isinstance(along, str):  # otherwise the pattern is the one along the axis already
        spec = spec_along(spec, along)
    return Formula(spec, Options(center, scale, float(eps), activation), axes, sizes), labels


def _stages(formula: Formula, params: Sequence[Tensor | None]) -> list[Param]:
    """Weight and bias of every stage, the reverse of `_flat`."""
    stages = list(zip(params[::2], params[1::2], strict=True))
    if stages and not formula.affines:
        raise unnamed_axes(formula.spec, *stages[0])
    return stages


class _Call(NamedTuple):
    """A call as dynamo saw it: read, checked, and as the entry points take it."""

    recipe: Recipe
    operands: Operands
    given: tuple[Any, ...]
    moments: Moments | None  # in the dtype of statistics, if they are not x's own
    used: Moments | None  # the same as they were given, or cumulated

    @classmethod
    def of(
        cls,
        x: Tensor,
        mask: Tensor | None,
        params: Sequence[Tensor | None],
        ids: Sequence[Tensor],
        numbers: Sequence[int],
        eps: float,
        text: str,
        moments: Sequence[Tensor | None] = (),
    ) -> _Call:
        formula, labels = _heard(ids, numbers, eps, text)
        stages = _stages(formula, params)
        recipe, operands = formula.prepare(x, mask, stages, labels)
        used = Moments(*moments) if moments else None  # type: ignore[arg-type]
        *_, along, apart = _parsed(text)
        if used is None and (along is not None or apart):
            read = {name: labels[name] for name in formula.of_moments.lookups}
            fields = _statistics_of(formula.of_moments, x, mask, read)
            used = Moments(*fields)
            if along is not None:
                used = used.cumulative() if _derived() else Moments(*torch.ops.flexnorm.cumulative(*fields))
        external = None if used is None else outward_moments(formula.spec.sets, recipe, used, x)
        if len(stages) > 1:  # of which the operands are one now
            assert recipe.params is not None
            formula = Formula(formula.spec, formula.options, [recipe.params.expr], dict(formula.sizes))
        return cls(recipe, operands, _given(formula, operands, labels), external, used)


def _given(formula: Formula, operands: Operands, labels: Mapping[str, Partition]) -> tuple[Any, ...]:
    """What the entry points take."""
    counts = [labels[name].count for name in formula.lookups]
    counts += [size for _, size in formula.sizes if type(size) is not int]
    return *operands, [labels[name]._ids for name in formula.lookups], counts, written(formula)


def _statistics_of(
    formula: Formula, x: Tensor, mask: Tensor | None, labels: Mapping[str, Partition]
) -> tuple[Tensor, ...]:
    """The moments of x, shaped as the pattern says."""
    recipe, operands = formula.prepare(x, mask, (), labels)
    if _derived():
        return _outward(recipe, aten.statistics(recipe, operands))
    found: tuple[Tensor, ...] = torch.ops.flexnorm.statistics(*_given(formula, operands, labels))
    return found


def _derived() -> bool:
    """Whether torch.func looks into the operator: where nothing but autograd knows it, derivatives would be zeros."""
    return torch._C._are_functorch_transforms_active()


class _Eager(NamedTuple):
    """What runs complex numbers, which no operator below knows: `functional` puts its own here."""

    run: Any = None
    moments: Any = None


eager = _Eager()


def _run_complex(
    x: Tensor,
    mask: Tensor | None,
    params: Sequence[Tensor | None],
    ids: Sequence[Tensor],
    numbers: Sequence[int],
    eps: float,
    text: str,
    moments: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Moments | None]:
    formula, labels = _heard(ids, numbers, eps, text)
    stages = _stages(formula, params)
    *_, along, apart = _parsed(text)
    given = Moments(*moments) if moments else None  # type: ignore[arg-type]
    how = {"tracked": True, "apart": apart, "cumulative": along is not None}
    y, used = eager.run(formula, x, mask, stages, given, labels, **how)
    return y, used


def _call_normalize(*arguments: Any, moments: Sequence[Tensor | None]) -> Tensor:
    if arguments[0].is_complex():
        return _run_complex(*(*arguments, moments))[0]
    recipe, operands, given, external, _ = _Call.of(*(*arguments, moments))
    if external is None:
        return aten.evaluate(recipe, operands) if _derived() else torch.ops.flexnorm.forward(*given)[0]
    return _applied(recipe, operands, given, external)


def _call_tracked(*arguments: Any) -> tuple[Tensor, ...]:
    """y, and the moments used."""
    if arguments[0].is_complex():
        y, m = _run_complex(*arguments)
        assert m is not None
        return y, m.count, m.mean, m.m2, _low(m)
    recipe, operands, given, external, used = _Call.of(*arguments)
    if external is not None and used is not None:
        y = _applied(recipe, operands, given, external)
        return y, used.count, used.mean, used.m2, _low(used)
    if _derived():
        y, kept = aten.forward(recipe, operands)
        return y, *_outward(recipe, aten.moments(recipe, operands, kept))
    found: tuple[Tensor, ...] = torch.ops.flexnorm.forward(*given)
    return found


def _call_moments(x: Tensor, mask: Tensor | None, ids: Any, numbers: Any, text: str) -> tuple[Tensor, ...]:
    formula, labels = _heard(ids, numbers, 1e-5, text)
    if x.is_complex():
        m = eager.moments(formula, x, mask, labels)
        return m.count, m.mean, m.m2, _low(m)
    read = {name: labels[name] for name in formula.of_moments.lookups}
    return _statistics_of(formula.of_moments, x, mask, read)


def _call_coarsen(fields: Sequence[Tensor], ids: Any, numbers: Any, text: str) -> tuple[Tensor, ...]:
    pattern, told = _between(ids, numbers, text)
    m = Moments(*fields).coarsen(pattern, **told)
    return m.count, m.mean, m.m2, _low(m)


def _call_refine(
    fields: Sequence[Tensor], shape: Sequence[int], ids: Any, numbers: Any, text: str
) -> tuple[Tensor, ...]:
    pattern, told = _between(ids, numbers, text)
    m = Moments(*fields).refine(pattern, shape, **told)
    return m.count, m.mean, m.m2, _low(m)


def _between(ids: Sequence[Tensor], numbers: Sequence[int], text: str) -> tuple[str, dict[str, Any]]:
    """A pattern from smaller sets to larger ones, with its sizes and labels."""
    pattern, of_labels, of_sizes = ast.literal_eval(text)
    labels = {name: Partition._made(label, count) for name, label, count in zip(of_labels, ids, numbers, strict=False)}
    return pattern, {"sizes": dict(zip(of_sizes, numbers[len(ids) :], strict=True)), **labels}


def _applied(recipe: Recipe, operands: Operands, given: tuple[Any, ...], external: Moments) -> Tensor:
    if _derived():
        return aten.apply(recipe, operands, each(recipe.sets.inward, external))
    y: Tensor = torch.ops.flexnorm.apply(*given, *(t.contiguous() for t in external._fields))
    return y


def _outward(recipe: Recipe, m: Moments) -> tuple[Tensor, ...]:
    m = m.outward(recipe.sets)
    return m.count, m.mean, m.m2, _low(m)


def _low(m: Moments) -> Tensor:
    return torch.zeros_like(m.mean) if m.low is None else m.low


_CALL = "Tensor x, Tensor? mask, Tensor?[] params, Tensor[] ids, SymInt[] numbers, float eps, str text"
for _name, _schema in {
    "normalize": f"({_CALL}, *, Tensor?[] moments) -> Tensor",
    "tracked": f"({_CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "moments": f"(Tensor x, Tensor? mask, Tensor[] ids, SymInt[] numbers, str text) -> ({_MOMENTS})",
    "coarsen": f"(Tensor[] moments, Tensor[] ids, SymInt[] numbers, str text) -> ({_MOMENTS})",
    "refine": f"(Tensor[] moments, SymInt[] shape, Tensor[] ids, SymInt[] numbers, str text) -> ({_MOMENTS})",
}.items():
    _LIBRARY.define(_name + _schema)
    for _key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
        _LIBRARY.impl(_name, globals()[f"_call_{_name}"], _key)
