"""`normalize` and `moments`: a pattern, a tensor, and what the pattern names, made into one call of a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError, SpecError, say, shown
from ..partition import Partition
from ..spec import Expr, Spec
from ..statistics import Moments
from ..watching import unwatched
from . import traced
from .arguments import (
    Formula,
    Label,
    Options,
    as_partition,
    check_eps,
    label_names,
    sort_names,
    spec_along,
    unnamed_axes,
)
from .call import ALONE, Call, new
from .ranks import Ranks, Sharding
from .routes import compiling, own_moments, run
from .steps import corrected


def normalize(
    x: Tensor,
    pattern: str,
    mask: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    affine: str | None = None,
    center: bool | Tensor = True,
    scale: bool = True,
    eps: float = 1e-5,
    correction: float = 0,
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
        center: subtract the mean. Without it the variance is that about zero (RMSNorm). A tensor: the share of the mean
            that is subtracted, over the last axes of the statistics (GraphNorm); the variance is that about this share.
        scale: divide by the standard deviation.
        eps: added to the variance, in the unit of x squared.
        correction: the variance is M2 / (count - correction), as in `torch.var`; 0 is the biased variance. A set of so
            many elements or fewer gives 0 (then bias).
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
    share, centered = (center, True) if isinstance(center, Tensor) else (None, center)
    if sharded is None and process_group is None:
        if compiling(x):
            options = Options(centered, scale, eps, activation, correction)
            if share is not None or correction:
                if moments is None:
                    own = traced.called_moments(x, pattern, mask, sizes, labels, names, affine)
                    moments = own if cumulative is None else own.cumulative()
                moments = corrected(moments, correction) if correction else moments
                moments = moments if share is None else moments.about(share.to(moments.m2.dtype))
            stages = [] if affine is None and weight is None and bias is None else [(weight, bias)]
            return traced.called(x, pattern, mask, stages, affine, options, moments, cumulative, sizes, labels, names)
        asked = None
        if sizes is None and labels is None and cumulative is None and unwatched(x):
            asked = _asked((pattern, affine, centered, scale, eps, activation, correction), names)
        if asked is not None and (affine is not None or (weight is None and bias is None)):
            formula, partitions = asked
            given = () if affine is None else ((weight, bias),)
            return run(new(Call, (formula, x, mask, given, moments, partitions, False, share, (), None)))[0]
    options = Options(centered, scale, eps, activation, correction)
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
        given = () if params is None else ((weight, bias),)
        call = Call(formula, x, mask, given, moments, partitions, center=share, ranks=ranks)
        return run(call, change=None if cumulative is None else Moments.cumulative).y


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
        if compiling(x):
            return traced.called_moments(x, pattern, mask, sizes, labels, names)
        if sizes is None and labels is None and unwatched(x):
            asked = _asked((pattern, None, True, True, 1e-5, None, 0), names)
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
    pattern, affine, center, scale, eps, activation, correction = text
    if type(pattern) is not str or type(center) is not bool or type(scale) is not bool or type(eps) is not float:
        return None
    if type(correction) is not int and type(correction) is not float:
        return None
    if (affine is not None and type(affine) is not str) or (activation is not None and type(activation) is not str):
        return None
    told = tuple([item for item in names.items() if type(item[1]) is int])
    given = {name: value for name, value in names.items() if type(value) is not int} if told else names
    try:
        formula = _typed(pattern, affine, center, scale, eps, activation, correction, told, tuple(given))
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
    correction: float,
    told: tuple[tuple[str, int], ...],
    labels: tuple[str, ...],
) -> Formula:
    """The formula of what was typed, checked once."""
    options, spec = Options(center, scale, eps, activation, correction), Spec.parse(pattern)
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
