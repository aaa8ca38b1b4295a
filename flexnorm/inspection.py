"""`explain`: what a pattern, a layer or a model does to a tensor, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from .calls import complexes
from .calls.arguments import Formula, Label, Options, as_partition, check_eps, label_names, sort_names
from .calls.call import Call
from .calls.given import observed
from .calls.ranks import alone
from .errors import SpecError, as_int, say, shown
from .kernels import Operands, Plan, Recipe, choose, stat_dtype
from .layers.norm import Norm
from .partition import Partition
from .probe import arguments_of, undisturbed
from .sets import Sets, sets_of
from .spec import Axis, Dots, Element, Group, Spec

__all__ = ["Explanation", "Report", "explain"]

FEW = 16  # elements below which the error of a variance is worth a warning: it is above a third


@dataclass(frozen=True)
class AxisRole:
    """An axis of x: its name, its size, and what becomes of it."""

    name: str
    size: int
    role: str  # "kept", "pooled", or "read by" labels

    def __str__(self) -> str:
        return f"{self.name} {self.role}" if self.name.isdecimal() else f"{self.name}={self.size} {self.role}"


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a pattern does to a tensor. `print` it, show it in a notebook, or `draw()` it.

    Attributes:
        pattern, shape, dtype: of what.
        axes: what becomes of every axis.
        count: number of sets, empty ones included.
        sizes: smallest, median and largest number of elements of the sets that are not empty; with a floating mask,
            their effective number (sum w)^2 / sum w^2. None: all sets are empty.
        empty, single: number of sets without elements, and with one.
        outside: elements that a bool mask leaves in no set.
        names: what its statistics are called elsewhere, with these sizes.
        gains, offsets: the sets that a positive factor, or a summand, may be another for, without a change of the
            result (but for eps); None: any changes it.
        removed: degrees of freedom that are lost: numbers that the result does not depend on.
        error: relative standard deviation of the variance of the smallest set, sqrt(2 / (m - 1)), for independent
            normal elements; None without scale.
        mixes: what else a result depends on than its own sample, in words; None: nothing. Samples are the first axis.
        parameters: names and shapes.
        plan: which kernel computes it where a gradient may be asked for, and why.
        moved: bytes that forward reads and writes at least.
        saved: bytes that are kept for backward beside x and the user's own tensors.
        notes: what else there is to know.
    """

    pattern: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[AxisRole, ...]
    count: int
    sizes: tuple[float, float, float] | None
    empty: int
    single: int
    outside: int
    names: tuple[str, ...]
    gains: str | None
    offsets: str | None
    removed: int
    error: float | None
    mixes: str | None
    parameters: Mapping[str, tuple[int, ...]]
    plan: Plan
    moved: int
    saved: int
    notes: tuple[str, ...] = ()
    peer: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)  # the first name, if it is torch's
    drawing: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def facts(self) -> Iterator[tuple[str, str]]:
        """What it says, as pairs of a word and a text."""
        inside = (math.prod(self.shape) - self.outside) * (2 if self.dtype.is_complex else 1)
        yield "pattern", self.pattern
        yield "x", f"{'x'.join(map(str, self.shape)) or 'one number'}, {str(self.dtype).removeprefix('torch.')}"
        yield "axes", ", ".join(map(str, self.axes)) or "none"
        yield "sets", self._sets()
        yield "known as", "; ".join(self.names) or "no other name"
        yield "parameters", ", ".join(f"{name} {list(shape)}" for name, shape in self.parameters.items()) or "none"
        yield "invariant to", self._invariances()
        yield "removes", f"{self.removed:,} of {_many(inside, 'degree')} of freedom"
        if self.error is not None:
            yield "variance error", self._error(self.error)
        alone = "each result depends on its own sample alone: the same in training and evaluation"
        yield "samples", self.mixes or alone
        yield "kernel", str(self.plan)
        yield "memory", f"moves {_bytes(self.moved)} forward, keeps x and {_bytes(self.saved)} for backward"
        for note in self.notes:
            yield "note", note

    def _sets(self) -> str:
        if self.sizes is None:
            return f"{self.count:,}, all of them empty" if self.count else "none"
        least, median, most = self.sizes
        size = _many(most, "element")
        said = [f"{self.count:,} of {extent(self.sizes)[: -len(numeral(most))]}{size}"]
        if least != most:
            said[0] += f", median {numeral(median)}"
        if self.empty:
            said.append(f"{self.empty:,} empty")
        if self.single and self.offsets is not None:
            said.append(f"{self.single:,} of one element, which becomes 0")
        elif self.single:
            said.append(f"{self.single:,} of one element, of which the sign is left")
        if self.outside:
            said.append(f"{_many(self.outside, 'element')} outside of the mask")
        return "; ".join(said)

    def _invariances(self) -> str:
        gain, offset = f"a positive gain{self.gains}", f"an offset{self.offsets}"
        said = [text for text, any_ in ((gain, self.gains), (offset, self.offsets)) if any_ is not None]
        return " and ".join(said) or "what its note says"

    def _error(self, error: float) -> str:
        if math.isinf(error):
            return "a set of one element has no variance"
        text = f"{error:.1%} in the smallest set, if elements are independent and normal"
        if self.sizes is not None and self.sizes[0] < FEW:
            text += ": so few elements say little of their variance, and the result is noisy"
        return text

    def __str__(self) -> str:
        facts = list(self.facts())
        width = max(len(word) for word, _ in facts)
        return "\n".join(f"{word:<{width}}  {text}" for word, text in facts)

    def _repr_html_(self) -> str:
        style = "style='text-align:left'"
        rows = (f"<tr><th {style}>{escape(a)}</th><td {style}>{escape(b)}</td></tr>" for a, b in self.facts())
        return f"<table>{''.join(rows)}</table>"

    def draw(self, path: str | None = None) -> Any:
        """The picture of it, a matplotlib Figure; written to path (.svg, .png) if there is one. For `flexnorm[viz]`."""
        from .drawing import draw

        return draw(self.pattern, path=path, **self.drawing)


@dataclass(frozen=True, eq=False)
class Report:
    """All norms of a model, a row for each. `print` it, or show it in a notebook.

    Attributes:
        columns, rows: the table.
        explanations: of the layers that were seen at work, by their names.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    explanations: Mapping[str, Explanation] = field(repr=False)

    def __str__(self) -> str:
        if not self.rows:
            return "no norm in this model"
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        lines = [self.columns, tuple("-" * width for width in widths), *self.rows]
        padded = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in lines)
        return "\n".join(line.rstrip() for line in padded)

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

        return f"<table>{row(self.columns, 'th')}{''.join(row(cells, 'td') for cells in self.rows)}</table>"


@overload
def explain(
    what: str,
    /,
    x: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
    *,
    affine: str | None = None,
    center: bool = True,
    scale: bool = True,
    eps: float = 1e-5,
    activation: str | None = None,
    dtype: torch.dtype = torch.float32,
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Label] | None = None,
    **names: int | Label,
) -> Explanation: ...


@overload
def explain(
    what: nn.Module, /, x: Any = None, mask: Any = None, *, dtype: torch.dtype = torch.float32, **names: Any
) -> Any: ...


def explain(
    what: str | nn.Module,
    /,
    x: Any = None,
    mask: Any = None,
    *,
    affine: str | None = None,
    center: bool = True,
    scale: bool = True,
    eps: float = 1e-5,
    activation: str | None = None,
    dtype: torch.dtype = torch.float32,
    sizes: Mapping[str, int] | None = None,
    labels: Mapping[str, Label] | None = None,
    **names: Any,
) -> Explanation | Report:
    """Says what a pattern, a layer or a whole model does to a tensor, before anything is computed.

    Args:
        what: a pattern; a `Norm`, an adapter, or a norm of torch; or a model, of which all norms are listed.
        x: a tensor, or its shape. Of a model, what it is called with: a tensor, a shape, a tuple of arguments or a dict
            of keywords. It then runs once, in evaluation, and nothing of it is updated. Without x, of layers and
            models: what is known without it.
        mask, affine, center, scale, eps, activation, sizes, labels, **names: as in `normalize`. Of a layer, what it is
            called with beside x: mask, labels, lengths, batch.
        dtype: of x, where a shape is given.

    Returns:
        An `Explanation`; of a model, of a mixture of several patterns, or without x, a `Report`.

    Raises:
        SpecError, ShapeError: as in `normalize`.

    >>> print(explain("n (g c) h w -> n g", (8, 64, 32, 32), g=32))  # doctest: +ELLIPSIS
    pattern         n (g c) h w -> n g
    x               8x64x32x32, float32
    axes            n=8 kept, g=32 kept, c=2 pooled, h=32 pooled, w=32 pooled
    sets            256 of 2,048 elements
    known as        nn.GroupNorm(32, 64)
    parameters      none
    invariant to    a positive gain per n g and an offset per n g
    removes         512 of 524,288 degrees of freedom
    variance error  3.1% in the smallest set, if elements are independent and normal
    samples         each result depends on its own sample alone: the same in training and evaluation
    kernel          ...
    memory          moves 4.00 MiB forward, keeps x and 3.00 KiB for backward
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.BatchNorm2d(8))
    >>> print(explain(model, (2, 3, 8, 8)))
    layer  class        pattern             sets  elements  known as            samples             parameters
    -----  -----------  ------------------  ----  --------  ------------------  ------------------  ----------
    1      GroupNorm    n (g c) ... -> n g  4     144       nn.GroupNorm(2, 8)  apart               16
    3      BatchNorm2d  n c ... -> c        8     72        nn.BatchNorm2d(8)   running statistics  16
    """
    if isinstance(what, nn.Module):
        if not is_norm(what) or x is None:
            return _report(what, x)
        return _of_layer(what, x, mask, names if labels is None else {**names, "labels": labels}, dtype)
    spec = Spec.parse(what)
    params = None if affine is None else spec.read(affine, "affine")
    told, found = sort_names(spec, [params], sizes, labels, names)
    check_eps(spec, eps, told, found)
    read = label_names(spec, params)
    partitions = {name: as_partition(*read[name], value) for name, value in found.items()}
    formula = Formula(spec, Options(center, scale, eps, activation), () if params is None else (params,), told)
    beside = [t for t in (mask, *(p.ids for p in partitions.values())) if isinstance(t, Tensor)]
    like = _like(x, dtype, beside[0].device if beside else torch.device("cpu"), spec)
    return _explained(formula, like, mask, partitions)


# --- one formula on one tensor ---------------------------------------------------------------------------------------


def _like(x: Any, dtype: torch.dtype, device: torch.device, spec: Spec | None = None) -> Tensor:
    """The tensor, or one of this shape that takes no memory."""
    if isinstance(x, Tensor):
        return x.detach()
    shape = [as_int(size) for size in x] if isinstance(x, Sequence) and not isinstance(x, (str, bytes)) else [None]
    sizes = [size for size in shape if size is not None and size >= 0]
    if len(sizes) < len(shape) or math.prod(sizes) >= 2**60:
        rule, received = "x is a tensor, or its shape: whole numbers, 0 or more", f"x={shown(x)}"
        text = None if spec is None else spec.text
        raise SpecError(say(rule, text=text, received=received, instead="(8, 64, 32, 32), say"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(sizes, dtype=dtype, device=device)


class _About(NamedTuple):
    """What a layer adds to its formula."""

    kind: str
    parameters: Mapping[str, tuple[int, ...]]
    tracks: bool = False  # running statistics, which it evaluates by
    notes: tuple[str, ...] = ()
    named: bool = True  # what has its pattern computes the same
    plain: bool = True  # it uses the moments of its pattern as they are


def _explained(
    formula: Formula,
    x: Tensor,
    mask: Tensor | None,
    partitions: Mapping[str, Partition],
    about: _About | None = None,
) -> Explanation:
    spec, options = formula.spec, formula.options
    read = {name: partitions[name] for name in label_names(spec) if name in partitions}
    recipe, _ = Formula(spec, options, (), dict(formula.sizes)).prepare(x, mask, (), read)
    sets = recipe.sets
    parameters = {} if about is None else about.parameters
    weights: list[tuple[Tensor, Tensor]] = []
    for expr in formula.affines:
        shape = sets_of(sets.axes, expr, partitions).shape if set(label_names(spec, expr)) <= set(partitions) else None
        if shape is not None:
            weights.append((x.new_empty(shape), x.new_empty(shape)))
            parameters = parameters or {"weight": shape, "bias": shape}
    full, operands = recipe, Operands(x, mask)
    if len(weights) == len(formula.affines):
        full, operands = formula.prepare(x, mask, weights, partitions)
    tally = _tally(recipe, mask)
    parts = 2 if x.is_complex() else 1  # numbers in an element
    lost = parts * options.center + options.scale
    error = None
    if options.scale and tally.sizes is not None:
        freedom = parts * (tally.sizes[0] - options.center)
        error = math.sqrt(2 / freedom) if freedom > 0 else math.inf
    unknown = tally.sizes is None or tally.sizes[2] <= 1 or options.correction
    named = [] if unknown else list(_names(recipe, spec, x))
    if about is not None:
        named = sorted(named, key=lambda name: not name.text.startswith(f"nn.{about.kind}(")) if about.named else []
    per = str(spec.sets)
    where = f" per {per}" if per else ", one for all of x"
    wide = stat_dtype(x.dtype).itemsize
    counts = 0 if mask is None and not sets.merges else wide if mask is not None and not recipe.membership else 8
    beside = {id(t): t for t in (mask, *operands[2:], *(p.ids for p in partitions.values())) if t is not None}
    return Explanation(
        pattern=str(spec),
        shape=tuple(x.shape),
        dtype=x.dtype,
        axes=tuple(_roles(sets, spec)),
        count=sets.count,
        sizes=tally.sizes,
        empty=tally.empty,
        single=tally.single,
        outside=tally.outside,
        names=tuple(name.text for name in named),
        gains=where if options.scale and (about is None or about.plain) else None,
        offsets=where if options.center and (about is None or about.plain) else None,
        removed=tally.sum(lambda members: (parts * members).clamp(max=lost)),
        error=error,
        mixes=_mixes(sets, spec, tracks=about is not None and about.tracks),
        parameters=parameters,
        plan=_plan(formula, full, operands, partitions, tracks=about is not None and about.tracks),
        moved=2 * x.numel() * x.dtype.itemsize + sum(t.numel() * t.dtype.itemsize for t in beside.values()),
        saved=sets.count * (3 * parts * wide + counts),
        notes=() if about is None else about.notes,
        peer=named[0].peer if named else None,
        drawing={"shape": tuple(x.shape), "mask": mask, "labels": read, "sizes": dict(formula.sizes)},
    )


def _plan(
    formula: Formula, recipe: Recipe, operands: Operands, partitions: Mapping[str, Partition], *, tracks: bool
) -> Plan:
    asked = "asked for" if tracks else None
    if not operands.x.is_complex():
        return choose(recipe, operands, differentiated=True, moments=asked)
    halves = complexes.in_parts(formula)  # real and imaginary part are one more axis
    inner, of_parts = halves.prepare(complexes.parts(operands.x), operands.mask, (), partitions)
    return choose(inner, of_parts, differentiated=True, moments="needed first")


class _Tally(NamedTuple):
    """How many elements the sets have; each entry stands for `times` sets."""

    members: Tensor  # that have a weight above 0
    effective: Tensor  # (sum w)^2 / sum w^2
    times: int
    outside: int

    @property
    def sizes(self) -> tuple[float, float, float] | None:
        filled = self.effective[self.members > 0].double()
        if self.times == 0 or filled.numel() == 0:
            return None
        return float(filled.min()), float(filled.median()), float(filled.max())

    @property
    def empty(self) -> int:
        return self.sum(lambda members: members == 0)

    @property
    def single(self) -> int:
        return self.sum(lambda members: members == 1)

    def sum(self, of: Callable[[Tensor], Tensor]) -> int:
        return int(of(self.members).sum()) * self.times


def _tally(recipe: Recipe, mask: Tensor | None) -> _Tally:
    sets = recipe.sets
    one = torch.ones((1,) * sets.axes.rank, dtype=torch.int64)
    if mask is not None and recipe.mask is not None:
        weights = recipe.mask.inward(mask.detach())
        members = sets.sum((weights > 0).to(torch.int64))
    else:
        weights = one.to(sets.merges[0].ids.device if sets.merges else "cpu")
        members = sets.sum(weights)
    members = members.flatten().cpu()
    times = sets.count // members.numel() if members.numel() else 0  # the same along axes that the mask does not have
    if recipe.membership or mask is None:
        outside = math.prod(sets.axes.shape) - int(members.sum()) * times
        return _Tally(members, members, times, outside)
    weights = weights.double()
    squares = sets.sum(weights * weights).flatten().cpu()
    effective = sets.sum(weights).flatten().cpu().square() / squares.where(squares > 0, 1.0)
    return _Tally(members, effective, times, 0)


def _roles(sets: Sets, spec: Spec) -> Iterator[AxisRole]:
    own = set(sets.axes.places(spec.sets.atoms()))
    for place, (name, size) in enumerate(zip(sets.axes.names, sets.axes.sizes, strict=True)):
        labels = [lookup.label for lookup in spec.sets.lookups() if place in sets.axes.places(lookup.axes)]
        role = "kept" if place in own else f"read by {', '.join(labels)}" if labels else "pooled"
        yield AxisRole(name, size, role)


def _mixes(sets: Sets, spec: Spec, *, tracks: bool) -> str | None:
    """What else a result depends on than its own sample, where the samples are the first axis of x."""
    kind = next(_dims(sets, spec), None)
    said = None
    if kind is not None and any(role.role == "pooled" for role in kind.roles):
        name = " ".join(role.name for role in kind.roles if role.role == "pooled")
        said = f"those along {name} share statistics: a result is noisy in small batches, differs from batch to batch, "
        said += "and tells of other samples"
    elif kind is not None and any(role.role != "kept" for role in kind.roles):
        role = next(role for role in kind.roles if role.role != "kept")
        said = f"a result depends on all {role.name} of the same {role.role.removeprefix('read by ')}, and on no others"
    if not tracks:
        return said
    running = "evaluation goes by running statistics, and differs from training"
    return running if said is None else f"{said}; {running}"


# --- what it is called elsewhere -------------------------------------------------------------------------------------


class _Dim(NamedTuple):
    """A dimension of x, which may be a composition of axes.

    kind: "k" kept, "p" pooled, "s" split into kept ones and, inside of them, pooled ones, "l" read by one label alone,
    "1" of size 1, "m" something else.
    """

    kind: str
    sets: int  # along it
    label: str
    roles: list[AxisRole]


def _dims(sets: Sets, spec: Spec) -> Iterator[_Dim]:
    roles, place = list(_roles(sets, spec)), 0
    for element in spec.x.elements:
        width = len(element.atoms) if isinstance(element, Group) else 1
        for _ in range(len(sets.axes.dots) if isinstance(element, Dots) else 1):
            parts = roles[place : place + width]
            place += width
            yield _dim(sets, spec, parts, element)


def _dim(sets: Sets, spec: Spec, parts: list[AxisRole], element: Element) -> _Dim:
    real = [part for part in parts if part.size != 1] or parts[:1]
    kinds = "".join({"kept": "k", "pooled": "p"}.get(part.role, "l") for part in real)
    kept = math.prod(part.size for part in real if part.role == "kept")
    atoms = element.atoms if isinstance(element, Group) else (element,)
    if not kinds:
        return _Dim("1", 1, "", parts)
    if set(kinds) == {"l"}:
        lookup = next((lookup for lookup in spec.sets.lookups() if lookup.axes == atoms), None)
        if lookup is None or parts[0].role != f"read by {lookup.label}" or not isinstance(atoms[0], Axis):
            return _Dim("m", 0, "", parts)
        return _Dim("l", sets.labels[lookup.label].count, lookup.label, parts)
    if set(kinds) == {"k", "p"} and "pk" not in kinds:
        return _Dim("s", kept, "", parts)
    return _Dim(kinds[0] if len(set(kinds)) == 1 else "m", kept, "", parts)


class _Name(NamedTuple):
    text: str
    peer: Callable[[Tensor], Tensor] | None = None


def _names(recipe: Recipe, spec: Spec, x: Tensor) -> Iterator[_Name]:
    """Names by meaning: what the sets are under the sizes of x, whatever the text of the pattern."""
    dims, shape = list(_dims(recipe.sets, spec)), tuple(x.shape)
    masked = "" if recipe.mask is None else ", masked" if recipe.membership else ", weighted"
    found = _names_of_torch(dims, shape, recipe)
    if not found and len(dims) > 2:  # channels last
        turned, sizes = [dims[0], dims[-1], *dims[1:-1]], (shape[0], shape[-1], *shape[1:-1])
        for text, peer in _names_by_channel(turned, sizes, recipe):
            found.append(_Name(f"{text} of x.movedim(-1, 1)", peer and partial(_turned, peer)))
    found += _names_of_others(dims, shape, recipe)
    for text, peer in found:
        yield _Name(text + masked, peer if recipe.mask is None and not x.is_complex() else None)


def _turned(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return of(x.movedim(-1, 1)).movedim(1, -1)


def _is(dims: Sequence[_Dim], kinds: str, rest: str = "") -> bool:
    """Whether the dimensions are of these kinds, and those that follow of the kind `rest`. Size 1 is kept or pooled."""
    if len(dims) < len(kinds) or (len(dims) > len(kinds) and not rest):
        return False
    wanted = kinds + rest * (len(dims) - len(kinds))
    return all(dim.kind == want or (dim.kind == "1" and want in "kp") for dim, want in zip(dims, wanted, strict=True))


def _names_of_torch(dims: list[_Dim], shape: tuple[int, ...], recipe: Recipe) -> list[_Name]:
    if not recipe.scale:
        pooled = tuple(i for i, dim in enumerate(dims) if dim.kind == "p")
        if any(dim.kind not in "kp1" for dim in dims):
            return []
        return [_Name(f"x - x.mean({pooled}, keepdim=True)", lambda x: x - x.mean(pooled, keepdim=True))]
    kept = next((i for i, dim in enumerate(dims) if dim.kind not in "k1"), len(dims))
    found = _names_by_channel(dims, shape, recipe)
    if kept == len(dims) or not _is(dims[kept:], "", "p"):
        return found
    eps, size = recipe.eps, list(shape[kept:])
    said = size[0] if len(size) == 1 else size
    if not recipe.center:  # torch's own eps is another here, so it is always told
        return [_Name(f"nn.RMSNorm({said}, eps={eps!r})", lambda x: F.rms_norm(x, size, eps=eps))]
    name = _Name(f"nn.LayerNorm({said}{_told(eps)})", lambda x: F.layer_norm(x, size, eps=eps))
    return [*found, name] if kept == 2 and len(size) > 1 else [name, *found]


def _names_by_channel(dims: list[_Dim], shape: tuple[int, ...], recipe: Recipe) -> list[_Name]:
    """Those of (N, C, *spatial)."""
    if not (recipe.center and recipe.scale) or len(dims) < 2:
        return []
    found, eps, channels, space = [], recipe.eps, shape[1], len(dims) - 2
    rest = f"{channels}{_told(eps)})"
    if _is(dims, "kk", "p") and 1 <= space <= 3:
        found.append(_Name(f"nn.InstanceNorm{space}d({rest}", lambda x: F.instance_norm(x, eps=eps)))
    groups = next(
        (g for kinds, g in (("kk", channels), ("kp", 1), ("ks", dims[1].sets)) if _is(dims, kinds, "p")), None
    )
    if groups is not None:
        found.append(_Name(f"nn.GroupNorm({groups}, {rest}", partial(F.group_norm, num_groups=groups, eps=eps)))
    if _is(dims, "pk", "p") and space <= 3:
        peer = partial(F.batch_norm, running_mean=None, running_var=None, training=True, eps=eps)
        found.append(_Name(f"nn.BatchNorm{max(space, 1)}d({rest} in training", peer))
    return found


def _told(eps: float) -> str:
    return "" if eps == 1e-5 else f", eps={eps!r}"


def _names_of_others(dims: list[_Dim], shape: tuple[int, ...], recipe: Recipe) -> Iterator[_Name]:
    """Of flexnorm's adapters, and of PyG."""
    if not (recipe.center and recipe.scale):
        return
    told, rank = _told(recipe.eps), len(dims)
    if _is(dims, "kks"):
        yield _Name(f"flexnorm.sequences.TokenGroupNorm({dims[2].sets}, {shape[2]}{told})")
    if rank == 2 and dims[0].kind == "l":
        channels, of = shape[1], f" of batch={dims[0].label}"
        if dims[1].kind == "k":
            yield _Name(f"torch_geometric.nn.InstanceNorm({channels}{told}){of}")
            yield _Name(f"torch_geometric.nn.GraphNorm({channels}{told}){of}, while its mean_scale is 1")
        elif dims[1].kind == "p":
            yield _Name(f'torch_geometric.nn.LayerNorm({channels}{told}, mode="graph"){of}')
        elif dims[1].kind == "s":
            yield _Name(f"flexnorm.graphs.GraphGroupNorm({dims[1].sets}, {channels}{told}){of}")
    if _is(dims, "klp") or _is(dims, "kklp"):
        yield _Name(f"flexnorm.spectrograms.MelBandNorm({dims[-2].label}, {shape[-2]}{told})")
    if _is(dims, "kl", "p"):
        label = dims[1].label
        yield _Name(f"flexnorm.images.ChannelGroupNorm({dims[1].sets}, {shape[1]}{told}, groups={label})")


# --- layers ----------------------------------------------------------------------------------------------------------

_Formed = tuple[str, Options, dict[str, int]]


def _over_last(module: Any, *, center: bool) -> _Formed:
    names = [f"c{i}" for i in range(len(module.normalized_shape))]
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    sizes = dict(zip(names, module.normalized_shape, strict=True))
    return f"... {' '.join(names)} -> ...", Options(center=center, eps=eps), sizes


def _over_groups(module: nn.GroupNorm) -> _Formed:
    return "n (g c) ... -> n g", Options(eps=module.eps), {"(g c)": module.num_channels, "g": module.num_groups}


PATTERNS: Mapping[type[nn.Module], Callable[[Any], _Formed]] = {
    nn.GroupNorm: _over_groups,
    nn.LayerNorm: partial(_over_last, center=True),
    nn.RMSNorm: partial(_over_last, center=False),
    nn.SyncBatchNorm: lambda m: ("n c ... -> c", Options(eps=m.eps), {}),
    _BatchNorm: lambda m: ("n c ... -> c", Options(eps=m.eps), {}),
    _InstanceNorm: lambda m: ("n c ... -> n c", Options(eps=m.eps), {}),
}
"""What the norms of torch are: pattern, options, and sizes of axes."""

NORMS: tuple[type[nn.Module], ...] = (Norm, *PATTERNS)
"""Norms by class; a subclass of torch's may compute something of its own."""


def is_norm(module: nn.Module) -> bool:
    """Whether its formula is known."""
    return formula_of(module) is not None


def formula_of(module: nn.Module) -> Formula | None:
    """What a norm computes. A subclass of torch's with a forward of its own is none of them, as PyG's InstanceNorm."""
    if isinstance(module, Norm):
        return module._formula
    for cls, formed in PATTERNS.items():
        if isinstance(module, cls) and type(module).forward is cls.forward:
            text, options, sizes = formed(module)
            return Formula(Spec.parse(text), options, (), sizes)
    return None


def roles(spec: Spec) -> str:
    """What becomes of each element of x, a letter each: k kept, p pooled (K and P of an ellipsis), s a composition of a
    kept axis and a pooled one, ? of others, 1 the unit axis."""
    kept, said = list(spec.sets.atoms()), ""
    for element in spec.x.elements:
        atoms = element.atoms if isinstance(element, Group) else (element,)
        parts = "".join("k" if atom in kept else "p" for atom in atoms)
        letter = "1" if not parts else "s" if parts == "kp" else parts[0] if len(set(parts)) == 1 else "?"
        said += letter.upper() if isinstance(element, Dots) else letter
    return said


def _about(module: nn.Module, tracks: bool | None = None) -> _About:
    """What a layer says without x."""
    inside = isinstance(module, Norm)  # a gate, say
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=inside) if not is_lazy(p)}
    tracks = getattr(module, "running_mean", None) is not None if tracks is None else tracks
    if not isinstance(module, Norm):
        return _About(type(module).__name__, own, tracks)
    notes = [changes] if (changes := module.changes()) else []
    if module._options.correction:
        notes.append(f"the variance is M2 / (count - {module._options.correction})")
    axis = module._cumulative
    if axis is not None:
        notes.append(f"cumulative along {axis}: a set has all that came up to it, so sizes grow from these on")
    if module._sharding is not None:
        notes.append(f"sharded along {' '.join(module._sharding.names)}: what is counted here is this rank's part")
    return _About(type(module).__name__, own, tracks, tuple(notes), axis is None and not changes, not changes)


class _SeenError(Exception):
    """Ends a forward whose call is known."""


def _met(layer: Norm, call: Call) -> Call | None:
    """The call that the pattern of a layer meets. None: the layer normalizes by another pattern."""
    call = layer.fitted(call)
    return call if call.formula.spec is layer.formula.spec else None


def _of_layer(
    layer: nn.Module, x: Any, mask: Any, given: Mapping[str, Any], dtype: torch.dtype
) -> Explanation | Report:
    beside = [p.device for p in (*layer.parameters(), *layer.buffers())]
    like = _like(x, dtype, beside[0] if beside else torch.device("cpu"))
    if not isinstance(layer, Norm):
        formula = formula_of(layer)
        assert formula is not None
        if mask is not None or given:
            received, instead = ", ".join(["mask"] * (mask is not None) + list(given)), "explain(layer, x)"
            raise SpecError(say(f"{type(layer).__name__} takes x alone", received=received, instead=instead))
        return _explained(formula, _with_batch(layer, like), None, {}, _about(layer))
    made: list[Call] = []

    def note(of: Norm, call: Call) -> None:
        if of is layer:
            made.append(call)
            raise _SeenError

    with torch.no_grad(), suppress(_SeenError), observed(note):
        layer.forward(like, *([] if mask is None else [mask]), **given)
    call = _met(layer, made[0]) if made else None
    if call is None:
        received, instead = f"{type(layer).__name__}", "explain(its pattern, x)"
        raise SpecError(say("this layer normalizes nothing by its pattern", received=received, instead=instead))
    met, patterns = (call.x, call.mask, call.names), layer.patterns()
    if len(patterns) == 1:
        return _explained(layer.formula, *met, _about(layer))
    seen = {str(f.spec): _explained(f, *met, _about(layer, tracks)) for f, tracks in patterns}
    return Report(_COLUMNS, tuple(_row(f"{k + 1}", layer, seen[p], True, k) for k, p in enumerate(seen)), seen)


def _with_batch(layer: nn.Module, x: Tensor) -> Tensor:
    """torch's instance norms take one sample without its axis, too."""
    return x[None] if isinstance(layer, _InstanceNorm) and x.dim() == layer._get_no_batch_dim() else x  # type: ignore[no-untyped-call]


# --- models ----------------------------------------------------------------------------------------------------------

_COLUMNS = ("layer", "class", "pattern", "sets", "elements", "known as", "samples", "parameters")


def _report(model: nn.Module, x: Any) -> Report:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, NORMS)}
    inner = {id(part) for m in layers.values() if isinstance(m, Norm) for part in m.modules() if part is not m}
    layers = {name: m for name, m in layers.items() if id(m) not in inner}
    seen: dict[str, Explanation] = {}
    if x is not None:
        _observe(model, layers, x, seen)
    rows = [
        _row(_key(name, place), layer, seen.get(_key(name, place)), x is not None, place)
        for name, layer in layers.items()
        for place in range(len(layer.patterns()) if isinstance(layer, Norm) else 1)
    ]
    return Report(_COLUMNS, tuple(rows), seen)


def _key(name: str, place: int) -> str:
    """The name of a layer; of one with several patterns, the first has it, and the others count on."""
    return f"{name} ({place + 1})".strip() if place else name


def _row(name: str, layer: nn.Module, found: Explanation | None, ran: bool, place: int = 0) -> tuple[str, ...]:
    formula, tracks = layer.patterns()[place] if isinstance(layer, Norm) else (formula_of(layer), None)
    about = _about(layer, tracks)
    pattern = "its own" if formula is None else str(formula.spec)
    sets = elements = known = samples = ""
    if found is not None:
        sets, elements = f"{found.count:,}", "none" if found.sizes is None else extent(found.sizes)
        known = found.names[0].removesuffix(" in training") if found.names else ""
        samples = "mixed" if found.mixes else "apart"
    elif ran and formula is not None:
        sets = "not called"
    elif formula is not None:
        samples = "apart" if roles(formula.spec)[:1] in "kK1" else "mixed"
    if about.tracks:
        samples = "running statistics"
    count = 0 if place else sum(math.prod(shape) for shape in about.parameters.values())
    kind = type(layer).__name__
    return (name or "(model)", kind, pattern, sets, elements, known, samples, f"{count:,}")


@torch.no_grad()
def _observe(model: nn.Module, layers: Mapping[str, nn.Module], x: Any, seen: dict[str, Explanation]) -> None:
    """Runs the model once in evaluation, and explains what its norms are first called with."""
    places = {id(layer): name for name, layer in layers.items()}
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(alone())
        for name, layer in layers.items():
            formula = formula_of(layer)
            if formula is not None and not isinstance(layer, Norm):
                note = partial(_note_torch, seen, name, formula)
                stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        for part in model.modules():
            if isinstance(part, Norm):  # a layer is explained before it has seen a batch
                part.running_statistics = replace(part.running_statistics, unseen=True)
        stack.enter_context(observed(partial(_note, seen, places)))
        model.eval()
        args, kwargs = arguments_of(model, x)
        model(*args, **kwargs)


def _note(seen: dict[str, Explanation], names: Mapping[int, str], layer: Norm, made: Call) -> None:
    name = names.get(id(layer))
    if name is None or name in seen:
        return
    call = _met(layer, made)
    for place, (formula, tracks) in enumerate(layer.patterns() if call is not None else ()):
        assert call is not None
        about = _about(layer, tracks)
        seen[_key(name, place)] = _explained(formula, call.x.detach(), call.mask, call.names, about)


def _note_torch(
    seen: dict[str, Explanation], name: str, formula: Formula, layer: nn.Module, args: Any, kwargs: Any
) -> None:
    x = args[0] if args else kwargs.get("input")
    if name not in seen and isinstance(x, Tensor):
        seen[name] = _explained(formula, _with_batch(layer, x.detach()), None, {}, _about(layer))


# --- numbers ---------------------------------------------------------------------------------------------------------


def numeral(value: float) -> str:
    """A number of elements, which weights may make a fraction."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _many(value: float, what: str) -> str:
    return f"{numeral(value)} {what}{'' if value == 1 else 's'}"


def extent(sizes: tuple[float, float, float]) -> str:
    """The smallest and the largest size of sets."""
    least, most = numeral(sizes[0]), numeral(sizes[2])
    return most if least == most else f"{least} to {most}"


def _bytes(count: int) -> str:
    value, units = float(count), ["KiB", "MiB", "GiB", "TiB", "PiB"]
    if value < 1024:
        return f"{count} B"
    while value >= 1024 and units:
        value, unit = value / 1024, units.pop(0)
    return f"{value:.2f} {unit}"
