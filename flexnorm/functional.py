"""`normalize` and `moments`: a pattern, a tensor, and what the pattern names, made into one call of a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import ShapeError, SpecError, nearest, say
from .kernels import Recipe, aten, choose, native, stat_dtype
from .partition import Partition
from .sets import Axes, Sets, bind, sets_of, solve
from .spec import Expr, Lookup, Spec, keyword
from .statistics import Moments

Label = Tensor | Partition


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
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Label] | None = None,
    **names: int | Label,
) -> Tensor:
    r"""Normalizes every set that the pattern names, by the statistics of its own elements.

    For each set S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    with the biased variance. The right side of the pattern names the statistics: its axes index the sets, all other axes of x
    are pooled, as in `einops.reduce(x, pattern, "mean")`, which is the tensor of means.

    Args:
        x: floating tensor with the axes of the pattern's left side.
        pattern: `"n (g c) ... -> n g"`; `"b t c, b t -> b"` with a mask; `"v c -> graph[v] c"` with labels.
        mask: over the axes behind the comma. **bool**: True where an element is one; all others belong to no set, their output
            and their gradient are 0, whatever they hold. **floating**, >= 0: weighs the statistics; every element is normalized.
        weight, bias: over the axes that `affine` names.
        affine: axes of weight and bias: `"c"`, `"(g c)"`, `"type[v] c"`.
        center: subtract the mean. Without it the variance is that about zero (RMSNorm).
        scale: divide by the standard deviation.
        eps: added to the variance, in the unit of x squared.
        activation: "relu", "silu" or "gelu", applied to the result.
        moments: statistics to use instead of x's own, shaped as the right side of the pattern.
        sizes: sizes of axes and compositions, for those that cannot be keywords: `{"(g c)": 64}`.
        labels: labels that cannot be keywords.
        **names: sizes of axes (`g=32`), and labels: a tensor of ids, or a `Partition`.

    Returns:
        A tensor of x's shape, dtype and memory format. A set of one element or of equal values gives exactly 0 (then
        bias), a set of total weight 0 gives 0 (then bias).

    Raises:
        SpecError: the pattern, a name or an option means nothing.
        ShapeError: x, mask, label or parameter does not fit the pattern.

    >>> x = torch.tensor([[1.0, 3.0, 10.0, 30.0]])
    >>> normalize(x, "n (g c) -> n g", g=2, eps=0)
    tensor([[-1.,  1., -1.,  1.]])
    >>> normalize(x, "n c -> n kind[c]", kind=torch.tensor([0, 1, 0, 1]), eps=0)
    tensor([[-1., -1.,  1.,  1.]])
    >>> mask = torch.tensor([[True, True, False, False]])
    >>> normalize(x, "n c, n c -> n", mask, eps=0)
    tensor([[-1.,  1.,  0.,  0.]])

    Source: Wu and He, "Group Normalization", 2018, for the form; any partition of the elements in place of groups of channels.
    """
    spec = Spec.parse(pattern)
    params = None if affine is None else spec.read(affine, "affine")
    told, given = sort_names(spec, [params], sizes, labels, names)
    return run(
        spec,
        x,
        mask,
        Options(center, scale, eps, activation),
        params=params,
        weight=weight,
        bias=bias,
        external=moments,
        sizes=told,
        labels={name: as_partition(spec, name, value) for name, value in given.items()},
    )


def moments(
    x: Tensor,
    pattern: str,
    mask: Tensor | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Label] | None = None,
    **names: int | Label,
) -> Moments:
    """Count, mean and M2 of every set that the pattern names, shaped as its right side says. Arguments as in `normalize`.

    They merge (`m.merge(other)`, `m.coarsen("n c -> n")`) and are what `normalize(..., moments=m)` takes: statistics of tiles,
    of streams, of another tensor. Differentiable.

    >>> m = moments(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), "n c -> n")
    >>> m.mean, m.var, m.count
    (tensor([2., 6.]), tensor([1., 1.]), tensor([2, 2]))
    """
    spec = Spec.parse(pattern)
    told, given = sort_names(spec, [], sizes, labels, names)
    partitions = {name: as_partition(spec, name, value) for name, value in given.items()}
    recipe = prepare(spec, x, mask, Options(), None, told, partitions)
    return aten.statistics(recipe, x, mask).outward(recipe.sets)


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
            raise SpecError(say("eps is a number", received=f"eps={self.eps!r:.80}", instead="eps=1e-5"))
        if self.activation is not None and self.activation not in aten.ACTIVATIONS:
            raise SpecError(
                say(
                    f"activation is one of {', '.join(map(repr, aten.ACTIVATIONS))}, or None",
                    received=f"activation={self.activation!r:.80}",
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
    known = label_names(spec, parameters)
    axes = {axis.name for axis in spec.x.axes()}
    told, found = dict(sizes or {}), dict(labels or {})
    for name in found:
        if name not in known:
            raise _unknown(spec, name, axes, known)
    for name, value in names.items():
        if name in told or name in found:
            raise SpecError(say(f"{name!r} is given twice", text=spec.text, received=f"{name}={value!r:.80}, and in a dict"))
        if name in known:
            found[name] = value
        elif name in axes:
            told[name] = value
        else:
            raise _unknown(spec, name, axes, known)
    solve(spec, told, known)
    return told, found


def label_names(spec: Spec, parameters: Iterable[Expr | None]) -> dict[str, Lookup]:
    """The labels that the pattern and the axes of the parameters read."""
    exprs = [spec.sets, *(expr for expr in parameters if expr is not None)]
    return {lookup.label: lookup for expr in exprs for lookup in expr.lookups()}


def as_partition(spec: Spec, name: str, value: Any, count: int | None = None) -> Partition:
    """A label's value as a `Partition`; `count` is the number of values that was told before."""
    if isinstance(value, Partition):
        if count is not None and value.count != count:
            raise ShapeError(
                say(
                    f"label {name!r} has {count} values, as was told when the layer was built",
                    text=spec.text,
                    received=f"{name}={value!r}",
                    instead=f"Partition(ids, count={count})",
                )
            )
        return value
    if not isinstance(value, Tensor):
        raise SpecError(
            say(
                f"label {name!r} is given as a tensor of ids, or as a Partition",
                text=spec.text,
                received=f"{name}={value!r:.80}",
                instead=f"{name}=Partition.from_sizes([2, 1]) for sizes, {name}=torch.tensor([0, 0, 1]) for ids",
            )
        )
    try:
        return Partition(value, count)
    except ValueError as error:
        raise type(error)(f"label {name!r}: {error}") from None


def _unknown(spec: Spec, name: str, axes: Iterable[str], labels: Iterable[str]) -> SpecError:
    near = nearest(name, [*axes, *labels])
    return SpecError(
        say(
            f"{name!r} is no axis and no label of the pattern, and no option",
            text=spec.text,
            received=f"the axes are {spec.x.names()}; the labels are {', '.join(labels) or 'none'}",
            instead=f"{near}=..." if near else None,
        )
    )


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
    for name, lookup in label_names(spec, [params]).items():
        if name not in labels:
            expr = spec.sets if lookup in tuple(spec.sets.lookups()) else params
            assert expr is not None
            raise SpecError(expr.error(f"label {name!r} is read, and not given", lookup, instead=keyword(name, "ids", "labels")))
        if labels[name].device != x.device:
            raise SpecError(
                say(
                    f"label {name!r} lies on the device of x",
                    received=f"{name} on {labels[name].device}, x on {x.device}",
                    instead=f"{name}.to(x.device), once for all layers",
                )
            )
    mask_sets = None if mask is None else _check_mask(spec, axes, x, mask)
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
    if not isinstance(x, Tensor):
        raise SpecError(say("x is a torch.Tensor", text=spec.text, received=f"{type(x).__name__}"))
    if not x.is_floating_point():
        raise SpecError(
            say("x is a floating tensor", text=spec.text, received=f"x of {x.dtype}", instead="x.float()")
        )
    if x.layout != torch.strided:
        raise SpecError(
            say(
                "x is a dense tensor",
                text=spec.text,
                received=f"x of layout {x.layout}",
                instead="x.values() for a jagged tensor, with a label for its rows: Partition.from_offsets(x.offsets())",
            )
        )


def _check_mask(spec: Spec, axes: Axes, x: Tensor, mask: Tensor) -> Sets:
    if spec.mask is None:
        names = str(spec.x)
        raise SpecError(
            spec.x.error(
                "a mask was given, and the pattern has no axes for it",
                received=f"mask of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask),
                instead=f"its axes behind a comma: {names}, <axes of the mask> -> {spec.sets}",
            )
        )
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise SpecError(
            spec.mask.error(
                "a mask is a bool tensor (membership, True = valid) or a floating one (weights)",
                *spec.mask.elements,
                received=f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else f"{mask!r:.80}",
                instead="mask.bool(), or mask.float() for weights",
            )
        )
    sets = sets_of(axes, spec.mask)
    if tuple(mask.shape) != sets.shape:
        raise ShapeError(
            spec.mask.error(
                f"the mask has the axes behind the comma: {spec.mask}, shape {sets.shape}",
                *spec.mask.elements,
                received=f"mask of shape {tuple(mask.shape)}; {axes.known()}",
            )
        )
    if mask.device != x.device:
        raise SpecError(say("the mask lies on the device of x", received=f"mask on {mask.device}, x on {x.device}"))
    if mask.dtype != torch.bool and not torch._C._are_functorch_transforms_active():
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
                    instead="mask >= 0 as a bool mask, if -inf marks what is not valid",
                )
            )
    return sets


def check_parameters(params: Sets | None, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Whether weight and bias lie on the axes that they are said to lie on."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if params is None:
            raise SpecError(
                say(f"{name} is given, and not on which axes it lies", instead='affine="c", the axes of weight and bias')
            )
        if not isinstance(value, Tensor) or not value.is_floating_point():
            received = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise SpecError(say(f"{name} is a floating tensor", received=received))
        if tuple(value.shape) != params.shape:
            raise ShapeError(
                params.expr.error(
                    f"{name} has the axes {params.expr}: shape {params.shape}",
                    *params.expr.elements,
                    received=f"{name} of shape {tuple(value.shape)}; {params.axes.known()}",
                )
            )
        if value.device != x.device:
            raise SpecError(say(f"{name} lies on the device of x", received=f"{value.device}, x on {x.device}"))
    if params is not None and weight is None and bias is None:
        raise SpecError(say("affine= names the axes of weight and bias, and neither is given", instead="weight=w"))


def _inward_moments(recipe: Recipe, x: Tensor, external: Moments) -> Moments:
    """Moments from elsewhere, in the internal shape, about zero where the recipe does not center."""
    sets = recipe.sets
    if not isinstance(external, Moments):
        raise SpecError(say("moments= takes Moments", received=f"{external!r:.80}", instead="flexnorm.moments(x, pattern)"))
    for name in ("count", "mean", "m2"):
        shape = tuple(getattr(external, name).shape)
        if shape != sets.shape:
            raise ShapeError(
                sets.expr.error(
                    f"moments are shaped as the right side says: {sets.expr or 'one number'}, shape {sets.shape}",
                    *sets.expr.elements,
                    received=f"moments.{name} of shape {shape}; {sets.axes.known()}",
                )
            )
    internal = external.inward(sets, stat_dtype(x.dtype))
    if recipe.center:
        return internal
    return Moments(internal.count, torch.zeros_like(internal.mean), internal.about_zero())


# --- from a recipe to a kernel ---------------------------------------------------------------------------------------


def run(
    spec: Spec,
    x: Tensor,
    mask: Tensor | None,
    options: Options,
    *,
    params: Expr | None,
    weight: Tensor | None,
    bias: Tensor | None,
    external: Moments | None,
    sizes: Mapping[str, int],
    labels: Mapping[str, Partition],
) -> Tensor:
    """The one way from arguments to a result: prepare, plan, compute."""
    recipe = prepare(spec, x, mask, options, params, sizes, labels)
    check_parameters(recipe.params, x, weight, bias)
    given = None if external is None else _inward_moments(recipe, x, external)
    operands = (x, mask, weight, bias, *(() if given is None else (given.count, given.mean, given.m2)))
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    transformed = _seen_through(operands)
    plan = choose(
        recipe, x, weight, bias, differentiated=differentiated, transformed=transformed, external=given is not None
    )
    if plan.room == "native":
        return native.forward(recipe, x, weight, bias)
    if differentiated and not transformed:
        fields = (None,) * 4 if given is None else (given.count, given.mean, given.m2, given.low)
        return _Normalize.apply(recipe, x, mask, weight, bias, *fields)  # type: ignore[no-any-return, no-untyped-call]
    own = aten.statistics(recipe, x, mask) if given is None else given
    return aten.apply(recipe, x, mask, own, weight, bias)


def _seen_through(operands: Iterable[Tensor | None]) -> bool:
    """Whether somebody has to see the operations themselves, so that no autograd Function may hide them: its forward
    derivative would be zero, silently."""
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in operands
    )


class _Normalize(torch.autograd.Function):
    """Saves x, the user's own operands and the moments of the sets; nothing else of x's size."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        count: Tensor | None,
        mean: Tensor | None,
        m2: Tensor | None,
        low: Tensor | None,
    ) -> Tensor:
        ctx.recipe, ctx.own, ctx.has_bias = recipe, count is None, bias is not None
        if count is None or mean is None or m2 is None:
            y, moments = aten.forward(recipe, x, mask, weight, bias)
        else:
            moments = Moments(count, mean, m2, low)
            y = aten.apply(recipe, x, mask, moments, weight, bias)
        ctx.save_for_backward(x, mask, weight, bias, moments.count, moments.mean, moments.m2, moments.low)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        recipe: Recipe = ctx.recipe
        x, mask, weight, bias, count, mean, m2, low = ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.own:  # a derivative of this one will be asked for: let the moments depend on x
            moments = aten.statistics(recipe, x, mask)
        else:
            moments = Moments(count, mean, m2, low)
        sums = aten.backward_sums(recipe, dy, x, mask, moments, weight, bias)
        dx, dmask = aten.backward_dx(recipe, dy, x, mask, moments, weight, bias, sums if ctx.own else None)
        of_moments = (None,) * 3 if ctx.own else aten.backward_moments(recipe, moments, sums)
        return (None, dx, dmask, sums.weight, sums.bias, *of_moments, None)
