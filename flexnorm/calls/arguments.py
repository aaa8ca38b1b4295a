"""What a user passes beside the pattern (names, labels, masks, parameters), checked and made into a `Recipe`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..axes import Axes, bind, check_operand, check_shape, solve
from ..errors import ShapeError, SpecError, draw, nearest, say, shown
from ..kernels import Operands, Recipe, aten, stat_dtype
from ..library import library
from ..partition import Packed, Partition, packed, readable
from ..pattern import MOST_DIMS, Places, pattern_of
from ..sets import Labels, Sets, sets_of
from ..spec import RESERVED, Expr, Lookup, Spec, keyword
from ..statistics import Moments

Label = Tensor | Partition


@dataclass(frozen=True)
class Options:
    """The options of the formula, checked."""

    center: bool = True
    scale: bool = True
    eps: float = 1e-5
    activation: str | None = None
    correction: float = 0

    def __post_init__(self) -> None:
        if not self.center and not self.scale:
            raise SpecError(
                say(
                    "a norm subtracts the mean, divides by sigma, or both",
                    received="center=False, scale=False",
                    instead="center=False for RMSNorm, scale=False to subtract the mean only",
                )
            )
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)):
            raise SpecError(say("eps is a number", received=f"eps={shown(self.eps)}", instead="eps=1e-5"))
        number = isinstance(self.correction, (int, float)) and not isinstance(self.correction, bool)
        if not number or not 0 <= self.correction < math.inf:
            received, instead = f"correction={shown(self.correction)}", "correction=1 for the unbiased variance"
            raise SpecError(say("a correction is a number, 0 or more", received=received, instead=instead))
        if self.correction and not (self.center and self.scale):
            rule = "a correction is for the variance about the mean, which the result is divided by"
            received = f"correction={self.correction}, center={self.center}, scale={self.scale}"
            raise SpecError(say(rule, received=received, instead="correction=0"))
        for name in ("center", "scale"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                received, instead = f"{name}={shown(value)}", f"{name}=False; of an axis, sizes={{{name!r}: 8}}"
                raise SpecError(say(f"{name} is True or False", received=received, instead=instead))
        if self.activation is not None and not (
            isinstance(self.activation, str) and self.activation in aten.ACTIVATIONS
        ):
            raise SpecError(
                say(
                    f"activation is one of {', '.join(map(repr, aten.ACTIVATIONS))}, or None",
                    received=f"activation={shown(self.activation)}",
                    instead="None, and your own on the result",
                )
            )


# --- names -----------------------------------------------------------------------------------------------------------


def sort_names(
    spec: Spec,
    parameters: Iterable[Expr | None],
    sizes: Mapping[str, int] | None,
    labels: Mapping[str, Any] | None,
    names: Mapping[str, Any],
) -> tuple[dict[str, int], dict[str, Any]]:
    """Keywords, `sizes=` and `labels=`, as the sizes of axes and the labels of the pattern."""
    for option, value in (("sizes", sizes), ("labels", labels)):
        if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
            received, instead = f"{option}={shown(value)}", f'{option}={{"name": ...}}'
            raise SpecError(say(f"{option}= is a dict from names", received=received, instead=instead))
    known = label_names(spec, *parameters)
    axes = [axis.name for axis in spec.x.axes()]
    told, found = dict(sizes or {}), dict(labels or {})
    for name, value in names.items():
        if name in told or name in found:
            received = f"{name}={shown(value)}, and again in {'sizes=' if name in told else 'labels='}"
            raise SpecError(say(f"{name!r} is given once", text=spec.text, received=received, instead="leave one out"))
        (found if name in known else told)[name] = value
    for name, value in (*found.items(), *((n, v) for n, v in told.items() if n in names)):
        if name not in known and name not in axes:
            near = nearest(name, [*axes, *known, *RESERVED])
            raise SpecError(
                say(
                    f"{name!r} is no axis and no label of the pattern, and no option",
                    text=spec.text,
                    received=f"{name}={shown(value)}; axes: {spec.x.names()}; labels: {', '.join(known) or 'none'}",
                    instead=f"{near}=..." if near else f"leave {name}= out, or name it in the pattern",
                )
            )
    solve(spec, told, known)
    return told, found


def check_eps(spec: Spec, eps: float, sizes: Mapping[str, int], labels: Iterable[str]) -> None:
    """An axis may be called eps; then a whole number for eps was probably meant for the axis."""
    axis = next((axis for axis in spec.x.axes() if axis.name == "eps" and "eps" not in sizes), None)
    if axis is not None and isinstance(eps, int) and eps and "eps" not in labels:
        rule, received = "'eps' is an option, and the pattern has an axis of this name", f"eps={eps}"
        instead = f'sizes={{"eps": {eps}}} for the axis, eps={float(eps)} for the option'
        raise SpecError(spec.x.error(rule, axis, received=received, instead=instead))


def spec_along(spec: Spec, cumulative: str) -> Spec:
    """The pattern whose statistics are those of each place along an axis that they are to be cumulated along."""
    axes = {axis.name: axis for axis in spec.x.axes()}
    kept = [axis for axis in spec.sets.axes() if axis.name == cumulative]
    if not isinstance(cumulative, str) or cumulative not in axes or kept:
        pooled = [name for name, axis in axes.items() if axis not in list(spec.sets.axes())]
        raise SpecError(
            spec.x.error(
                "cumulative names one pooled axis of x",
                *(kept if kept else spec.x.elements),
                received=f"cumulative={shown(cumulative)}",
                instead=f"one of: {', '.join(pooled) or 'none, as no axis is pooled'}",
            )
        )
    return spec.keeping(cumulative)


def unnamed_axes(spec: Spec, weight: Tensor | None, bias: Tensor | None) -> SpecError:
    """What is raised where weight or bias is given, and no axes of theirs."""
    rule = f"{'weight' if weight is not None else 'bias'} is given, and affine= does not say what its axes are"
    received = shown(weight if weight is not None else bias)
    return SpecError(say(rule, text=spec.text, received=received, instead='affine="c", say'))


def label_missing(expr: Expr, lookup: Lookup) -> SpecError:
    """What is raised where a label is read and not given."""
    name, instead = lookup.label, keyword(lookup.label, "ids", "labels")
    return SpecError(expr.error(f"label {name!r} is read, and not given", lookup, instead=instead))


def label_names(spec: Spec, *parameters: Expr | None) -> dict[str, tuple[Expr, Lookup]]:
    """The labels that the pattern and the axes of the parameters read, and where."""
    exprs = [spec.sets, *(expr for expr in parameters if expr is not None)]
    return {lookup.label: (expr, lookup) for expr in reversed(exprs) for lookup in expr.lookups()}


def as_partition(expr: Expr, lookup: Lookup, value: Any, count: int | None = None) -> Partition:
    """The value of a label that `expr` reads, as a `Partition`; `count` is its number of values, if told before."""
    name = lookup.label
    if isinstance(value, Partition):
        if count is not None and value.count != count:
            raise ShapeError(
                expr.error(
                    f"label {name!r} has {count} values, as was told when the layer was built",
                    lookup,
                    received=f"{name}={value!r}",
                    instead=f"{name}=Partition(ids, count={count})",
                )
            )
        return value
    if not isinstance(value, Tensor):
        raise SpecError(
            expr.error(
                f"label {name!r} is given as a tensor of ids, or as a Partition",
                lookup,
                received=f"{name}={shown(value)}",
                instead=f"{name}=torch.from_numpy(ids)"
                if hasattr(value, "__array__")
                else f"{name}=Partition.from_sizes([2, 1]) for sizes, {name}=torch.tensor([0, 0, 1]) for ids",
            )
        )
    try:
        return Partition(value, count)
    except (SpecError, ShapeError) as error:
        where = draw(expr.text, [lookup.span])
        raise type(error)(f"label {name!r} cannot be read\n{where}\n{error}") from None


# --- from arguments to a recipe --------------------------------------------------------------------------------------

Param = tuple[Tensor | None, Tensor | None]  # weight and bias


class Formula:
    """A pattern with its options: all that is known before the tensors come. It keeps nothing of tensors.

    Args:
        affines: the axes of weight and bias, of every stage.
        sizes: of axes and compositions, as the user told them.
    """

    def __init__(self, spec: Spec, options: Options, affines: Iterable[Expr], sizes: Mapping[str, int]) -> None:
        self.spec, self.options, self.affines = spec, options, tuple(affines)
        self.sizes = tuple(sizes.items())
        self.lookups = label_names(spec, *self.affines)
        self.patterns = _Patterns(self)
        self._merged: Formula | None = None
        self._uncorrected: Formula | None = None
        if options.correction:
            self._uncorrected = Formula(spec, replace(options, correction=0), self.affines, sizes)
        self._recipes: dict[Any, Recipe] = {}
        self._stages: dict[int, _Stages] = {}

    @cached_property
    def told(self) -> frozenset[str]:
        """The axes of which `sizes` say how long they are."""
        return frozenset(solve(self.spec, dict(self.sizes)))

    @cached_property
    def of_moments(self) -> Formula:
        """The formula that says of the same sets what their moments are, whatever is made of them."""
        if self.options == Options() and not self.affines:
            return self
        return Formula(self.spec, Options(), (), dict(self.sizes))

    @property
    def uncorrected(self) -> Formula:
        """The formula by the biased variance."""
        return self if self._uncorrected is None else self._uncorrected

    def __reduce__(self) -> tuple[Any, ...]:
        return Formula, (self.spec, self.options, self.affines, dict(self.sizes))

    def packed(self, labels: Labels) -> tuple[Packed, ...] | None:
        """The labels as the library reads them; None: one is missing, or no memory that can be read."""
        found = []
        for name in self.lookups:
            label = labels.get(name)
            read = None if label is None else packed(label)
            if read is None:
                return None
            found.append(read)
        return tuple(found)

    def prepare(
        self, x: Tensor, mask: Tensor | None, params: Sequence[Param], labels: Labels
    ) -> tuple[Recipe, Operands]:
        """Checks everything against the pattern, and says what is to be computed, and with what.

        On a GPU the last recipes without labels are kept, because Triton keeps tables on the device for each.
        """
        if not (type(x) is Tensor and x.is_cuda) or self.lookups or len(params) > 1 or torch.compiler.is_compiling():
            return self._prepared(x, mask, params, labels)
        given = (mask, *(params[0] if params else (None, None)))
        key = (x.shape, x.dtype, *((t.shape, t.dtype) if isinstance(t, Tensor) else t for t in given))
        if key not in self._recipes:
            if len(self._recipes) >= 16:
                self._recipes.clear()
            self._recipes[key] = self._prepared(x, mask, params, labels)[0]
        elif mask is not None:
            _check_weights(self.spec, mask)
        return self._recipes[key], Operands(x, *given)

    def _prepared(
        self, x: Tensor, mask: Tensor | None, params: Sequence[Param], labels: Labels
    ) -> tuple[Recipe, Operands]:
        spec = self.spec
        _check_x(spec, x)
        axes = bind(spec, tuple(x.shape), self.sizes)
        mask_sets = None if mask is None else _check_mask(spec, axes, x, mask)
        for name, (expr, lookup) in self.lookups.items():
            if name not in labels:
                raise label_missing(expr, lookup)
            check_operand(expr, [lookup], f"label {name!r}", labels[name]._ids, x)
            check_shape(expr, f"label {name!r}", "one id at every index", [lookup], labels[name].shape, axes)
        sets, weight, bias = self._one(axes, params, x, labels, check=True)
        recipe = Recipe(
            sets=sets_of(axes, spec.sets, labels),
            mask=mask_sets,
            membership=mask is not None and mask.dtype == torch.bool,
            params=sets,
            center=self.options.center,
            scale=self.options.scale,
            eps=self.options.eps,
            activation=self.options.activation,
            told=frozenset(place for place, name in enumerate(axes.names) if name in self.told),
        )
        if not axes.symbolic and x.device.type == "cpu" and not torch.compiler.is_compiling():
            one = self if len(self.affines) < 2 or sets is None else self._of_one_stage(sets.expr)
            groups = one.packed(labels)
            if groups is not None:
                recipe = replace(recipe, pattern=one.patterns[x.dim()], groups=groups)
        return recipe, Operands(x, mask, weight, bias)

    def _of_one_stage(self, expr: Expr) -> Formula:
        """The formula of both affine stages as one."""
        if self._merged is None:
            self._merged = Formula(self.spec, self.options, (expr,), dict(self.sizes))
        return self._merged

    def _one(
        self, axes: Axes, params: Sequence[Param], x: Tensor, labels: Labels, *, check: bool = False
    ) -> tuple[Sets | None, Tensor | None, Tensor | None]:
        """All affine stages as one: its sets, weight and bias. Two merge over the axes of both, in float32 or wider."""
        stages = [
            (sets_of(axes, expr, labels), weight, bias)
            for expr, (weight, bias) in zip(self.affines, params, strict=True)
        ]
        if check:
            for sets, weight, bias in stages:
                _check_params(sets, weight, bias, x)
        if not stages:
            return None, None, None
        if len(stages) == 1:
            return stages[0]
        both = sets_of(axes, self.affines[0].union(self.affines[1]), labels)

        def over(sets: Sets, param: Tensor | None) -> Tensor | None:
            if param is None:
                return None
            wide = stat_dtype(x.dtype)
            return sets.over(param.to(wide.to_complex() if param.is_complex() else wide), both)

        first, second = ((over(sets, w), over(sets, b)) for sets, w, b in stages)
        weight, bias = (None if p is None else p.expand(both.shape) for p in _one_after_the_other(first, second))
        return both, weight, bias

    def of_one_stage(self, x: Tensor, params: Sequence[Param], labels: Labels) -> tuple[Formula, tuple[Param]] | None:
        """Both affine stages as one, from their shapes alone; None: they have to be looked at more closely."""
        if any(weight is None and bias is None for weight, bias in params) or any(
            n not in labels for n in self.lookups
        ):
            return None
        both = self._stages.get(x.dim())
        if both is None:
            both = self._stages[x.dim()] = _Stages(self, x.dim())
        sizes = None if both.pattern is None else library().sizes(both.pattern, x)
        if sizes is None:
            return None
        size = [*sizes, *(labels[name].count for name in reversed(both.formula.lookups))]  # ~label counts from the end
        shape, wide = [size[term] for term in both.terms], stat_dtype(x.dtype)
        found: list[Tensor | None] = []
        for (elements, own, order), pair in zip(both.stages, params, strict=True):
            written = [math.prod([size[term] for term in element]) for element in elements]
            for p in pair:
                if p is None:
                    found.append(None)
                    continue
                if list(p.shape) != written or not is_wide(p):
                    return None
                t = p.to(wide).reshape([size[term] for term in own]).permute(order)
                found.append(t.reshape([size[term] if term in own else 1 for term in both.terms]))
        one = _one_after_the_other(found[:2], found[2:])
        weight, bias = (None if p is None else p.expand(shape) for p in one)
        return both.formula, ((weight, bias),)


class _Stages:
    """Where the axes of two affine stages lie in one tensor over the axes of both."""

    def __init__(self, formula: Formula, dims: int) -> None:
        self.formula = formula._of_one_stage(formula.affines[0].union(formula.affines[1]))
        self.pattern = self.formula.patterns[dims]
        self.terms: list[int] = []
        self.stages: list[tuple[Any, list[int], list[int]]] = []
        if self.pattern is None:
            return
        places = Places(formula.spec, dims, list(self.formula.lookups))
        self.terms = [term for element in places.written(self.formula.affines[0]) for term in element]
        for expr in formula.affines:
            elements = places.written(expr)
            own = [term for element in elements for term in element]
            self.stages.append((elements, own, [own.index(term) for term in self.terms if term in own]))


def _one_after_the_other(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Param:
    """(xhat * weight + bias) * weight2 + bias2, as one weight and one bias."""
    (weight, bias), (weight2, bias2) = first, second
    if weight2 is not None:
        weight = weight2 if weight is None else weight * weight2
        bias = None if bias is None else bias * weight2
    if bias2 is not None:
        bias = bias2 if bias is None else bias + bias2
    return weight, bias


class _Patterns(dict[int, bytes | None]):
    """What the binder is told of a formula, by the rank of x: at most one for every rank that torch knows."""

    def __init__(self, formula: Formula) -> None:
        # Not the formula itself: a circle would keep both until the collector comes.
        self.spec, self.options, self.affines, self.sizes = (
            formula.spec,
            formula.options,
            formula.affines,
            formula.sizes,
        )
        self.labels = [lookup for _, lookup in formula.lookups.values()]

    def __missing__(self, dims: int) -> bytes | None:
        found = None
        if len(self.affines) < 2:
            told, params = solve(self.spec, dict(self.sizes)), self.affines[0] if self.affines else None
            found = pattern_of(self.spec, told, dims, self.labels, params, self.options)
        if dims <= MOST_DIMS:
            self[dims] = found
        return found


def _check_x(spec: Spec, x: Tensor) -> None:
    every = spec.x.elements
    if not isinstance(x, Tensor):
        received, instead = type(x).__name__, "torch.as_tensor(x)"
        raise SpecError(spec.x.error("x is a torch.Tensor", *every, received=received, instead=instead))
    if not (is_wide(x) or x.is_complex()):
        received, instead = f"x of {x.dtype}", "x.float()"
        raise SpecError(spec.x.error("x is a floating or complex tensor", *every, received=received, instead=instead))
    if x.layout != torch.strided or x.is_nested:
        raise SpecError(
            spec.x.error(
                "x is a dense tensor",
                *every,
                received=f"x of layout {x.layout}",
                instead="x.values() of a jagged tensor, and Partition.from_offsets(x.offsets()) as a label of its rows",
            )
        )


def _check_mask(spec: Spec, axes: Axes, x: Tensor, mask: Tensor) -> Sets:
    kind = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else shown(mask)
    if spec.mask is None:
        names = (isinstance(mask, Tensor) and axes.guess(mask.shape)) or "<axes of the mask>"
        label = next((f", or {lookup.label}=ids if it is this label" for lookup in spec.sets.lookups()), "")
        raise SpecError(
            spec.sets.error(
                "a mask is given, and the pattern does not say what its axes are",
                *spec.sets.elements,
                received=shown(mask),
                instead=f'"{spec.x}, {names} -> {spec.sets}"{label}',
            )
        )
    where = spec.mask.elements
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or is_wide(mask)):
        raise SpecError(
            spec.mask.error(
                "a mask is a bool tensor (membership, True = valid) or a floating one (weights)",
                *where,
                received=kind,
                instead="mask.bool(), or mask.float() for weights",
            )
        )
    check_operand(spec.mask, where, "the mask", mask, x)
    check_shape(spec.mask, "the mask", "the axes behind the comma", where, mask.shape, axes)
    _check_weights(spec, mask)
    return sets_of(axes, spec.mask)


def _check_weights(spec: Spec, mask: Tensor) -> None:
    """The values of a floating mask."""
    if not mask.is_floating_point() or not (readable(mask) or torch.compiler.is_compiling()):
        return
    assert spec.mask is not None
    weights = mask.detach()
    good = ((weights >= 0) & weights.isfinite()).all()
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(good, "flexnorm: the weights of a floating mask must be finite and not negative")
    elif not good:
        raise ShapeError(
            spec.mask.error(
                "the weights of a floating mask are finite and 0 or more",
                *spec.mask.elements,
                received=f"weights from {float(weights.min())} to {float(weights.max())}",
                instead="a bool mask; (mask == 0), if this is an additive one with -inf where nothing is valid",
            )
        )


def is_wide(t: Tensor) -> bool:
    """Whether it is of a floating type that torch computes with, so none of 8 bits."""
    return t.is_floating_point() and t.dtype.itemsize > 1


def _check_params(sets: Sets, weight: Tensor | None, bias: Tensor | None, x: Tensor) -> None:
    """Whether weight and bias have the axes that these sets name."""
    expr = sets.expr
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or not (is_wide(value) or (value.is_complex() and x.is_complex())):
            kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else shown(value)
            raise SpecError(expr.error(f"{name} is a floating tensor", received=kind, instead=f"{name}.float()"))
        check_operand(expr, expr.elements, name, value, x)
        if tuple(value.shape) != sets.shape:
            received = f"{name} of shape {tuple(value.shape)}; {sets.axes.known()}"
            guess = sets.axes.guess(value.shape)
            instead = f'"{guess}", if these are its axes' if guess else f"a tensor of shape {sets.shape}"
            rule = f"{name} has the axes {expr}: shape {sets.shape}"
            raise ShapeError(expr.error(rule, *expr.elements, received=received, instead=instead))
    if weight is None and bias is None:
        rule = "these are the axes of weight and bias, and neither is given"
        raise SpecError(expr.error(rule, *expr.elements, instead="weight=w, bias=b, or no affine="))


def outward_moments(expr: Expr, recipe: Recipe, external: Moments, x: Tensor) -> Moments:
    """Moments from elsewhere, checked, in the dtype of statistics; about zero where the recipe does not center."""
    sets = recipe.sets
    if not isinstance(external, Moments):
        received = f"moments={shown(external)}"
        raise SpecError(
            say("moments= takes Moments", received=received, instead="moments=flexnorm.moments(x, pattern)")
        )
    external.check()
    if tuple(external.mean.shape) != sets.shape:
        raise ShapeError(
            expr.error(
                f"moments are shaped as the right side says: shape {sets.shape}",
                *expr.elements,
                received=f"moments of shape {tuple(external.mean.shape)}; {sets.axes.known()}",
                instead=f'moments(x, "... -> {expr}"), or m.coarsen(...) of finer ones',
            )
        )
    check_operand(expr, expr.elements, "moments", external.mean, x)
    if external.mean.is_complex():
        received, instead = f"moments of {external.mean.dtype}, x of {x.dtype}", "moments(x.real, pattern), say"
        raise SpecError(expr.error("moments of complex numbers are for complex x", received=received, instead=instead))
    external = external.rounded(stat_dtype(x.dtype))
    if recipe.center:
        return external
    return Moments(external.count, torch.zeros_like(external.mean), external.about_zero())
