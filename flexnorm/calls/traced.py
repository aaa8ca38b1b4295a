"""What a tracer sees: the operators that go into its graph, and what it is told of the results of all others.

`normalize`, `tracked`, `moments`, `coarsen` and `refine` are all that dynamo sees. They take what the user gave, and
are made of other operations. So patterns are read, and errors raised, by Python itself, and not by a tracer of Python
that knows half of it. Below are the entry points of `operators.py`, which no tracer looks into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import SpecError, say, shown
from ..kernels import Operands, Recipe, aten, stat_dtype
from ..partition import Partition, flat, partitions_of
from ..spec import Spec
from ..statistics import Moments, each
from . import refused
from .arguments import Formula, Label, Options, Param, check_eps, outward_moments, sort_names, spec_along, unnamed_axes
from .operators import LIBRARY, MOMENTS, NAMED, OPERATORS, ROWS, VERSION, Given, low_of, of_given

T = TypeVar("T")

# --- calls that are traced -------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call as a user made it, in the order of the schemas: nothing is read yet."""

    x: Tensor
    mask: Tensor | None
    params: Sequence[Tensor | None]  # weight and bias of every stage
    pattern: str
    affines: Sequence[str]
    center: bool
    scale: bool
    eps: float
    activation: str | None
    size_names: Sequence[str]
    sizes: Sequence[int]
    label_names: Sequence[str]
    ids: Sequence[Tensor]
    tables: Sequence[Tensor]
    counts: Sequence[int]
    arguments: Sequence[str]  # "sizes", "labels" or "names", which said it: of every label, then of every size

    def read(self, along: str | None = None) -> tuple[Formula, dict[str, Partition]]:
        """The formula and its labels, read and checked as eager calls are."""
        said: dict[str, dict[str, Any]] = {"sizes": {}, "labels": {}, "names": {}}
        names = (*self.label_names, *self.size_names)
        values = (*partitions_of(self.ids, self.tables, self.counts), *self.sizes)
        for argument, name, value in zip(self.arguments, names, values, strict=True):
            said[argument][name] = value
        spec = Spec.parse(self.pattern)
        axes = [spec.read(affine, "affine") for affine in self.affines]
        sizes, labels = sort_names(spec, axes, *said.values())
        check_eps(spec, self.eps, sizes, labels)
        if along is not None:
            spec = spec_along(spec, along)
        options = Options(self.center, self.scale, float(self.eps), self.activation)
        return Formula(spec, options, axes, sizes), labels

    def stages(self, formula: Formula) -> list[Param]:
        """Weight and bias of every stage."""
        stages = list(zip(self.params[::2], self.params[1::2], strict=True))
        if stages and not formula.affines:
            raise unnamed_axes(formula.spec, *stages[0])
        return stages


_CALL = (
    "Tensor x, Tensor? mask, Tensor?[] params, str pattern, str[] affines, bool center, bool scale, "
    f"float eps, str? activation, {NAMED}, str[] arguments"
)


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
    if affine is not None and not isinstance(affine, str):
        rule, received = "affine is a string that names the axes of the parameters", f"{type(affine).__name__}"
        raise SpecError(say(rule, received=f"{received}: {shown(affine)}", instead='affine="c"'))
    if cumulative is not None and not isinstance(cumulative, str):
        rule, received = "cumulative names one pooled axis of x", f"cumulative={shown(cumulative)}"
        raise SpecError(say(rule, received=received, instead='cumulative="t", say'))
    affines = [] if affine is None else [affine]
    said = _said({"sizes": sizes or {}, "labels": labels or {}, "names": names})
    return _normalize(x, mask, params, pattern, affines, options, said, moments, cumulative)


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
    said = _said({"sizes": sizes or {}, "labels": labels or {}, "names": names})
    call = _call(x, mask, (), pattern, [] if affine is None else [affine], Options(), said)
    return Moments(*OPERATORS.moments.v3(*call))


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
    pattern, affines = formula.spec.text, [expr.text for expr in formula.affines]
    said = _said({"sizes": dict(formula.sizes), "labels": _labels_read(formula, labels)})
    if moments is not None or not (tracked or apart or cumulative):
        return _normalize(x, mask, params, pattern, affines, formula.options, said, moments, None), moments
    call = _call(x, mask, params, pattern, affines, formula.options, said)
    y, *fields = OPERATORS.tracked.v3(*call, apart, cumulative)
    return y, Moments(*fields)


def moments(formula: Formula, x: Tensor, mask: Tensor | None, labels: Mapping[str, Partition]) -> Moments:
    """`functional.own_moments`, likewise."""
    said = _said({"sizes": dict(formula.sizes), "labels": _labels_read(formula, labels)})
    affines = [expr.text for expr in formula.affines]
    call = _call(x, mask, (), formula.spec.text, affines, formula.options, said)
    return Moments(*OPERATORS.moments.v3(*call))


def _labels_read(formula: Formula, labels: Mapping[str, Partition]) -> dict[str, Partition]:
    """A layer may have labels that only its other patterns read."""
    return {name: labels[name] for name in formula.lookups if name in labels}


def _normalize(
    x: Tensor,
    mask: Tensor | None,
    params: Sequence[Param],
    pattern: str,
    affines: list[str],
    options: Options,
    said: tuple[Any, ...],
    moments: Moments | None,
    along: str | None,
) -> Tensor:
    if moments is not None and not isinstance(moments, Moments):
        raise SpecError("moments= takes Moments: moments=flexnorm.moments(x, pattern)")
    fields = [] if moments is None else [moments.count, moments.mean, moments.m2, moments.low]
    y: Tensor = OPERATORS.normalize.v3(*_call(x, mask, params, pattern, affines, options, said), fields, along)
    return y


def _call(
    x: Tensor,
    mask: Tensor | None,
    params: Sequence[Param],
    pattern: str,
    affines: list[str],
    o: Options,
    said: tuple[Any, ...],
) -> Call:
    if not isinstance(pattern, str):
        Spec.parse(pattern)  # raises
    stages = [t for stage in params for t in stage]
    return Call(x, mask, stages, pattern, affines, o.center, o.scale, o.eps, o.activation, *said)


def _said(arguments: Mapping[str, Mapping[str, Any]]) -> tuple[Any, ...]:
    """Sizes and labels, and the argument by which each came."""
    sizes: list[int] = []
    size_names, by_size, by_label = [], [], []
    labels: list[tuple[str, Partition]] = []
    for argument, values in arguments.items():
        for name, value in values.items():
            if not isinstance(name, str):
                received, instead = f"{argument}={shown(values)}", f'{argument}={{"name": ...}}'
                raise SpecError(say(f"{argument}= is a dict from names", received=received, instead=instead))
            label = Partition(value) if isinstance(value, Tensor) else value
            if isinstance(label, Partition):
                labels.append((name, label))
                by_label.append(argument)
            elif isinstance(value, int) and not isinstance(value, bool):
                sizes.append(value)
                size_names.append(name)
                by_size.append(argument)
            else:
                raise SpecError(f"{name!r} is the size of an axis, or a label: a tensor of ids or a Partition")
    return size_names, sizes, *flat(labels), [*by_label, *by_size]


# --- the operators in its graph --------------------------------------------------------------------------------------


def _seen(schema: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Makes a function the operator of its name, which a tracer takes apart after dynamo."""

    def made(body: Callable[..., T]) -> Callable[..., T]:
        name = f"{body.__name__.removeprefix('_seen_')}.{VERSION}"
        LIBRARY.define(name + schema)
        for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
            LIBRARY.impl(name, body, key)
        return body

    return made


@_seen(f"({_CALL}, Tensor?[] moments, str? along) -> Tensor")
def _seen_normalize(*arguments: Any) -> Tensor:
    *asked, fields, along = arguments
    call, cumulative = Call(*asked), along is not None
    if call.x.is_complex():
        return _complex(call, fields, along, apart=False, cumulative=cumulative)[0]
    one = _One.of(call, fields, along, apart=False, cumulative=cumulative)
    if one.moments is not None:
        return one.applied(one.moments)
    y: Tensor = aten.evaluate(one.recipe, one.operands) if _derived() else OPERATORS.forward.v3(*one.given())[0]
    return y


@_seen(f"({_CALL}, bool apart, bool cumulative) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def _seen_tracked(*arguments: Any) -> tuple[Tensor, ...]:
    """y, and the moments used."""
    *asked, apart, cumulative = arguments
    call = Call(*asked)
    if call.x.is_complex():
        y, m = _complex(call, (), None, apart=apart, cumulative=cumulative)
        assert m is not None
        return y, *_written(m)
    one = _One.of(call, (), None, apart=apart, cumulative=cumulative)
    if one.moments is not None and one.used is not None:
        return one.applied(one.moments), *_written(one.used)
    if _derived():
        y, kept = aten.forward(one.recipe, one.operands)
        return y, *_written(aten.moments(one.recipe, one.operands, kept).outward(one.recipe.sets))
    found: tuple[Tensor, ...] = OPERATORS.forward.v3(*one.given())
    return found


@_seen(f"({_CALL}) -> ({MOMENTS})")
def _seen_moments(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    formula, labels = call.read()
    if call.x.is_complex():
        return _written(eager.moments(formula, call.x, call.mask, labels))
    return _statistics(formula.of_moments, call.x, call.mask, labels)


@_seen(f"(Tensor[] moments, str pattern, {NAMED}) -> ({MOMENTS})")
def _seen_coarsen(fields: Sequence[Tensor], pattern: str, *named: Any) -> tuple[Tensor, ...]:
    sizes, labels = _between(*named)
    return _written(Moments(*fields).coarsen(pattern, sizes=sizes, **labels))


@_seen(f"(Tensor[] moments, SymInt[] shape, str pattern, {NAMED}) -> ({MOMENTS})")
def _seen_refine(fields: Sequence[Tensor], shape: Sequence[int], pattern: str, *named: Any) -> tuple[Tensor, ...]:
    sizes, labels = _between(*named)
    return _written(Moments(*fields).refine(pattern, shape, sizes=sizes, **labels))


def _between(
    size_names: Sequence[str], sizes: Sequence[int], label_names: Sequence[str], *labels: Any
) -> tuple[dict[str, int], dict[str, Partition]]:
    """Sizes and labels of a pattern from smaller sets to larger ones."""
    partitions = dict(zip(label_names, partitions_of(*labels), strict=True))
    return dict(zip(size_names, sizes, strict=True)), partitions


class _One(NamedTuple):
    """A call as dynamo saw it: read, checked, and of one stage, as the entry points take it."""

    formula: Formula
    labels: Mapping[str, Partition]
    recipe: Recipe
    operands: Operands
    moments: Moments | None  # in the dtype of statistics, if they are not x's own
    used: Moments | None  # the same as they were given, or cumulated

    @classmethod
    def of(
        cls, call: Call, fields: Sequence[Tensor | None], along: str | None, *, apart: bool, cumulative: bool
    ) -> _One:
        formula, labels = call.read(along)
        stages = call.stages(formula)
        recipe, operands = formula.prepare(call.x, call.mask, stages, labels)
        used = Moments(*fields) if fields else None  # type: ignore[arg-type]
        if used is None and (cumulative or apart):
            own = _statistics(formula.of_moments, call.x, call.mask, labels)
            used = Moments(*own)
            if cumulative:
                used = used.cumulative() if _derived() else Moments(*OPERATORS.cumulative.v3(*own))
        external = None if used is None else outward_moments(formula.spec.sets, recipe, used, call.x)
        if len(stages) > 1:  # the operands are those of one stage now
            assert recipe.params is not None
            formula = Formula(formula.spec, formula.options, [recipe.params.expr], dict(formula.sizes))
        return cls(formula, labels, recipe, operands, external, used)

    def given(self) -> Given:
        return Given.of(self.formula, self.operands, self.labels)

    def applied(self, external: Moments) -> Tensor:
        if _derived():
            return aten.apply(self.recipe, self.operands, each(self.recipe.sets.inward, external))
        y: Tensor = OPERATORS.apply.v3(*self.given(), *(t.contiguous() for t in external._fields))
        return y


def _statistics(
    formula: Formula, x: Tensor, mask: Tensor | None, labels: Mapping[str, Partition]
) -> tuple[Tensor, ...]:
    """The moments of x, shaped as the pattern says."""
    labels = {name: labels[name] for name in formula.lookups}
    recipe, operands = formula.prepare(x, mask, (), labels)
    if _derived():
        return _written(aten.statistics(recipe, operands).outward(recipe.sets))
    found: tuple[Tensor, ...] = OPERATORS.statistics.v3(*Given.of(formula, operands, labels))
    return found


def _derived() -> bool:
    """Whether torch.func looks into the operator: where nothing but autograd knows it, derivatives would be zeros."""
    return torch._C._are_functorch_transforms_active()


def _written(m: Moments) -> tuple[Tensor, ...]:
    return m.count, m.mean, m.m2, low_of(m)


class _Eager(NamedTuple):
    """What runs complex numbers, which no operator below knows: `functional` puts its own here."""

    run: Any = None
    moments: Any = None


eager = _Eager()


def _complex(
    call: Call, fields: Sequence[Tensor | None], along: str | None, *, apart: bool, cumulative: bool
) -> tuple[Tensor, Moments | None]:
    formula, labels = call.read(along)
    given = Moments(*fields) if fields else None  # type: ignore[arg-type]
    how = {"tracked": True, "apart": apart, "cumulative": cumulative}
    y, used = eager.run(formula, call.x, call.mask, call.stages(formula), given, labels, **how)
    return y, used


refused.define(LIBRARY)

# --- what it is told of the entry points -----------------------------------------------------------------------------


def _told(body: Callable[..., T]) -> Callable[..., T]:
    """Says what the results of an entry point are like, by a function of its name."""
    torch.library.register_fake(f"flexnorm::{body.__name__.removeprefix('_told_')}.{VERSION}", body, lib=LIBRARY)
    return body


@_told
@of_given
def _told_forward(given: Given) -> tuple[Tensor, ...]:
    return torch.empty_like(given.x), *_like_moments(given)


@_told
@of_given
def _told_statistics(given: Given) -> tuple[Tensor, ...]:
    return _like_moments(given)


@_told
@of_given
def _told_apply(given: Given, *_: Tensor) -> Tensor:
    return torch.empty_like(given.x)


@_told
@of_given
def _told_backward(given: Given, *_: Tensor) -> list[Tensor]:
    weights = given.mask if given.mask is not None and given.mask.is_floating_point() else None
    return _empty(given.x, weights, given.weight, given.bias)


@_told
@of_given
def _told_backward_sums(given: Given, *_: Tensor) -> list[Tensor]:
    mean = _like_moments(given)[1]
    return _empty(mean, mean, given.weight, given.bias)


@_told
@of_given
def _told_backward_dx(given: Given, *others: Tensor | None) -> list[Tensor]:
    grad_xhat = others[-1]
    weighed = given.mask is not None and given.mask.is_floating_point() and grad_xhat is not None
    return _empty(given.x, given.mask if weighed else None)


@_told
def _told_cumulative(*fields: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=ROWS) for t in fields)


@_told
def _told_backward_cumulative(count: Tensor, mean: Tensor, m2: Tensor, *_: Tensor) -> list[Tensor]:
    of = [mean, m2, count] if count.is_floating_point() else [mean, m2]
    return [torch.empty_like(t, memory_format=ROWS) for t in of]


def _like_moments(given: Given) -> tuple[Tensor, ...]:
    wide = stat_dtype(given.x.dtype)
    count = wide if given.mask is not None and given.mask.is_floating_point() else torch.int64
    shape = given.prepare().sets.shape
    return tuple(given.x.new_empty(shape, dtype=dtype) for dtype in (count, wide, wide, wide))


def _empty(x: Tensor, *others: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x), *(torch.empty_like(t, memory_format=ROWS) for t in others if t is not None)]
