"""What a user passes beside the pattern (names, labels, masks, parameters), checked and made into a `Recipe`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .axes import Axes, bind, solve
from .errors import ShapeError, SpecError, draw, nearest, say, shown
from .kernels import Recipe, aten, stat_dtype
from .partition import Partition
from .sets import Sets, sets_of
from .spec import RESERVED, Expr, Lookup, Spec, keyword
from .statistics import Moments

Label = Tensor | Partition


@dataclass(frozen=True)
class Options:
    """The options of the formula, checked."""

    center: bool = True
    scale: bool = True
    eps: float = 1e-5
    activation: str | None = None

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
        if self.activation is not None and self.activation not in aten.ACTIVATIONS:
            raise SpecError(
                say(
                    f"activation is one of {', '.join(map(repr, aten.ACTIVATIONS))}, or None",
                    received=f"activation={shown(self.activation)}",
                    instead=f"None, and torch.{self.activation} on the result",
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


def prepare(
    spec: Spec,
    x: Tensor,
    mask: Tensor | None,
    options: Options,
    params: Expr | None,
    sizes: Mapping[str, int],
    labels: Mapping[str, Partition],
) -> Recipe:
    """Checks x, mask and labels against the pattern, and says what is to be computed."""
    _check_x(spec, x)
    axes = bind(spec, tuple(x.shape), tuple(sizes.items()))
    mask_sets = None if mask is None else _check_mask(spec, axes, x, mask)
    for name, (expr, lookup) in label_names(spec, params).items():
        if name not in labels:
            instead = keyword(name, "ids", "labels")
            raise SpecError(expr.error(f"label {name!r} is read, and not given", lookup, instead=instead))
        _check_device(expr, (lookup,), f"label {name!r}", labels[name].device, x.device)
        _check_shape(expr, (lookup,), f"label {name!r}", "one id at every index", lookup.axes, labels[name].shape, axes)
    return Recipe(
        sets=sets_of(axes, spec.sets, labels),
        mask=mask_sets,
        membership=mask is not None and mask.dtype == torch.bool,
        params=None if params is None else sets_of(axes, params, labels),
        center=options.center,
        scale=options.scale,
        eps=options.eps,
        activation=options.activation,
    )


def _check_x(spec: Spec, x: Tensor) -> None:
    every = spec.x.elements
    if not isinstance(x, Tensor):
        received, instead = type(x).__name__, "torch.as_tensor(x)"
        raise SpecError(spec.x.error("x is a torch.Tensor", *every, received=received, instead=instead))
    if not x.is_floating_point():
        received, instead = f"x of {x.dtype}", "x.float()"
        raise SpecError(spec.x.error("x is a floating tensor", *every, received=received, instead=instead))
    if x.layout != torch.strided:
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
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise SpecError(
            spec.mask.error(
                "a mask is a bool tensor (membership, True = valid) or a floating one (weights)",
                *where,
                received=kind,
                instead="mask.bool(), or mask.float() for weights",
            )
        )
    _check_shape(spec.mask, where, "the mask", "the axes behind the comma", where, mask.shape, axes)
    _check_device(spec.mask, where, "the mask", mask.device, x.device)
    if mask.is_floating_point() and not torch._C._are_functorch_transforms_active():
        weights = mask.detach()
        good = ((weights >= 0) & weights.isfinite()).all()
        if mask.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(good, "flexnorm: the weights of a floating mask must be finite and not negative")
        elif not good:
            raise ShapeError(
                spec.mask.error(
                    "the weights of a floating mask are finite and 0 or more",
                    *where,
                    received=f"weights from {float(weights.min())} to {float(weights.max())}",
                    instead="a bool mask; (mask == 0), if this is an additive one with -inf where nothing is valid",
                )
            )
    return sets_of(axes, spec.mask)


def check_parameters(params: Sets | None, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Whether weight and bias lie on the axes that they are said to lie on."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else shown(value)
        if params is None:
            rule = f"{name} is given, and affine= does not say what its axes are"
            raise SpecError(say(rule, received=kind, instead='affine="c", say'))
        expr = params.expr
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise SpecError(expr.error(f"{name} is a floating tensor", received=kind, instead=f"{name}.float()"))
        if tuple(value.shape) != params.shape:
            received = f"{name} of shape {tuple(value.shape)}; {params.axes.known()}"
            guess = params.axes.guess(value.shape)
            instead = f'"{guess}", if these are its axes' if guess else f"a tensor of shape {params.shape}"
            raise ShapeError(
                expr.error(
                    f"{name} has the axes {expr}: shape {params.shape}",
                    *expr.elements,
                    received=received,
                    instead=instead,
                )
            )
        _check_device(expr, expr.elements, name, value.device, x.device)
    if params is not None and weight is None and bias is None:
        rule = "these are the axes of weight and bias, and neither is given"
        raise SpecError(params.expr.error(rule, *params.expr.elements, instead="weight=w, bias=b, or no affine="))


def inward_moments(recipe: Recipe, external: Moments, dtype: torch.dtype) -> Moments:
    """Moments from elsewhere, in the internal shape; about zero where the recipe does not center."""
    sets = recipe.sets
    if not isinstance(external, Moments):
        received = f"moments={shown(external)}"
        raise SpecError(
            say("moments= takes Moments", received=received, instead="moments=flexnorm.moments(x, pattern)")
        )
    for name in ("count", "mean", "m2"):
        shape = tuple(getattr(external, name).shape)
        if shape != sets.shape:
            raise ShapeError(
                sets.expr.error(
                    f"moments are shaped as the right side says: shape {sets.shape}",
                    *sets.expr.elements,
                    received=f"moments.{name} of shape {shape}; {sets.axes.known()}",
                    instead=f'moments(x, "... -> {sets.expr}"), or m.coarsen(...) of finer ones',
                )
            )
    internal = external.inward(sets, stat_dtype(dtype))
    if recipe.center:
        return internal
    return Moments(internal.count, torch.zeros_like(internal.mean), internal.about_zero())


def _check_device(expr: Expr, parts: Sequence[Any], what: str, device: torch.device, expected: torch.device) -> None:
    if device != expected:
        raise ShapeError(
            expr.error(
                f"{what} lies on the device of x",
                *parts,
                received=f"{what} on {device}, x on {expected}",
                instead=f".to({str(expected)!r})",
            )
        )


def _check_shape(
    expr: Expr, parts: Sequence[Any], what: str, which: str, atoms: Sequence[Any], shape: torch.Size, axes: Axes
) -> None:
    expected = axes.shape_of(atoms)
    if tuple(shape) != expected:
        named = " ".join(map(str, atoms))
        guess = axes.guess(shape)
        if any(isinstance(part, Lookup) for part in parts):
            instead = f"ids of shape {expected}" + (
                f", or sizes that add up to {expected[0]}" if len(expected) == 1 else ""
            )
        else:
            instead = f'"{guess}", if these are its axes' if guess else f"a tensor of shape {expected}"
        raise ShapeError(
            expr.error(
                f"{what} has {which}, ({named}): shape {expected}",
                *parts,
                received=f"shape {tuple(shape)}; {axes.known()}",
                instead=instead,
            )
        )
