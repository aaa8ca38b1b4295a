"""The entry points of the rooms as operators of torch, `torch.ops.flexnorm.*`: what a tracer puts into its graph.

A graph holds no Python objects, so an operator takes tensors, and its formula as a text. Eager calls go to the rooms
directly, which is many times faster; both run the same kernels.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import Formula, Options, Param
from .kernels import ROOMS, Operands, Recipe, Room, Sums, choose, stat_dtype
from .partition import Partition
from .spec import Spec
from .statistics import Moments


def written(formula: Formula) -> str:
    """A formula of one affine stage at most, as text."""
    o = formula.options
    affine = str(formula.affines[0]) if formula.affines else None
    return repr((str(formula.spec), affine, formula.sizes, (o.center, o.scale, o.eps, o.activation)))


@lru_cache(maxsize=1024)
def _read(text: str) -> Formula:
    pattern, affine, sizes, options = ast.literal_eval(text)
    spec = Spec.parse(pattern)
    return Formula(spec, Options(*options), [] if affine is None else [spec.read(affine, "affine")], dict(sizes))


class _Arguments(NamedTuple):
    """What every operator takes: ids and counts of the labels are in the order of `Formula.lookups`."""

    x: Tensor
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    labels: Sequence[Tensor]
    counts: Sequence[int]
    formula: str

    def prepare(self) -> tuple[Recipe, Operands]:
        formula = _read(self.formula)
        labels = {
            name: Partition(ids, count)
            for name, ids, count in zip(formula.lookups, self.labels, self.counts, strict=True)
        }
        params = [(self.weight, self.bias)] if formula.affines else []
        return formula.prepare(self.x, self.mask, params, labels)


def _call(arguments: _Arguments) -> tuple[Recipe, Operands, Room]:
    recipe, operands = arguments.prepare()
    plan = choose(recipe, operands, differentiated=True)
    return recipe, operands, ROOMS[plan.room]


def _fields(recipe: Recipe, m: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count, mean, M2 and low in the internal shape, each with memory of its own, as results of operators have."""
    shape = recipe.sets.internal_shape
    low = torch.zeros_like(m.mean) if m.low is None else m.low
    count, mean, m2, low = (
        t.expand(shape).clone(memory_format=torch.contiguous_format) for t in (m.count, m.mean, m.m2, low)
    )
    return count, mean, m2, low


def traced(
    formula: Formula,
    x: Tensor,
    mask: Tensor | None,
    params: Sequence[Param],
    labels: Mapping[str, Partition],
) -> tuple[Tensor, ...]:
    """y and the moments, by an operator in the graph of a compiler."""
    weight, bias = params[0] if params else (None, None)
    partitions = [labels[name] for name in formula.lookups]
    ids, counts = [p.ids for p in partitions], [p.count for p in partitions]
    y: tuple[Tensor, ...] = torch.ops.flexnorm.forward(x, mask, weight, bias, ids, counts, written(formula))
    return y


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


# --- the operators ---------------------------------------------------------------------------------------------------

_GIVEN = "Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor[] labels, SymInt[] counts, str formula"
_MOMENTS = "Tensor count, Tensor mean, Tensor m2, Tensor low"
_SCHEMAS = {
    "forward": f"({_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "statistics": f"({_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor)",
    "apply": f"({_GIVEN}, {_MOMENTS}) -> Tensor",
    "backward": f"({_GIVEN}, {_MOMENTS}, Tensor dy) -> Tensor[]",
    "backward_sums": f"({_GIVEN}, {_MOMENTS}, Tensor dy) -> Tensor[]",
    "backward_dx": f"({_GIVEN}, {_MOMENTS}, Tensor dy, Tensor? grad, Tensor? grad_xhat) -> Tensor[]",
}


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """y, and the moments."""
    recipe, operands, room = _call(_Arguments(*arguments))
    y, kept = room.forward(recipe, operands)
    return y, *_fields(recipe, room.moments(recipe, operands, kept))


def _statistics(*arguments: Any) -> tuple[Tensor, ...]:
    recipe, operands, room = _call(_Arguments(*arguments))
    return _fields(recipe, room.statistics(recipe, operands))


def _apply(*arguments: Any) -> Tensor:
    recipe, operands, room = _call(_Arguments(*arguments[:7]))
    return room.apply(recipe, operands, Moments(*arguments[7:]))


def _backward(*arguments: Any) -> list[Tensor]:
    """The gradients of x, of a floating mask, of weight and of bias, of those that there are."""
    recipe, operands, room = _call(_Arguments(*arguments[:7]))
    *fields, dy = arguments[7:]
    return _present(*room.backward(recipe, operands, room.keep(recipe, operands, Moments(*fields)), dy))


def _backward_sums(*arguments: Any) -> list[Tensor]:
    """The sums over the sets, then the gradients of weight and of bias, of those that there are."""
    recipe, operands, room = _call(_Arguments(*arguments[:7]))
    *fields, dy = arguments[7:]
    sums = room.backward_sums(recipe, operands, Moments(*fields), dy)
    return [t.expand(recipe.sets.internal_shape).clone() for t in sums[:2]] + _present(*sums[2:])


def _backward_dx(*arguments: Any) -> list[Tensor]:
    """The gradients of x and of a floating mask, if there is one. Without sums the moments do not depend on x."""
    recipe, operands, room = _call(_Arguments(*arguments[:7]))
    *fields, dy, grad, grad_xhat = arguments[7:]
    sums = None if grad is None else Sums(grad, grad_xhat, None, None)
    return _present(*room.backward_dx(recipe, operands, Moments(*fields), dy, sums))


# --- what a tracer is told -------------------------------------------------------------------------------------------


def _like_fields(recipe: Recipe, operands: Operands) -> tuple[Tensor, ...]:
    x, mask = operands[:2]
    wide = stat_dtype(x.dtype)
    count = wide if mask is not None and mask.is_floating_point() else torch.int64
    return tuple(x.new_empty(recipe.sets.internal_shape, dtype=dtype) for dtype in (count, wide, wide, wide))


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(arguments[0]), *_fake_statistics(*arguments)


def _fake_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    return _like_fields(*_Arguments(*arguments).prepare())


def _fake_apply(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[0])


def _fake_backward(x: Tensor, mask: Tensor | None, *others: Any) -> list[Tensor]:
    weights = mask if mask is not None and mask.is_floating_point() else None
    return [torch.empty_like(t) for t in _present(x, weights, *others[:2])]


def _fake_backward_sums(*arguments: Any) -> list[Tensor]:
    _, mean, _, _ = _fake_statistics(*arguments[:7])
    return [torch.empty_like(t) for t in _present(mean, mean, *arguments[2:4])]


def _fake_backward_dx(x: Tensor, mask: Tensor | None, *others: Any) -> list[Tensor]:
    weights = mask if mask is not None and mask.is_floating_point() and others[-1] is not None else None
    return [torch.empty_like(t) for t in _present(x, weights)]


_LIBRARY: Any = torch.library.Library("flexnorm", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    # Below autograd, where nothing can be differentiated again: the rooms must not try.
    _LIBRARY.impl(_name, torch.no_grad()(globals()[f"_{_name}"]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"flexnorm::{_name}", globals()[f"_fake_{_name}"], lib=_LIBRARY)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mask, weight, bias, labels, counts, formula = inputs
    ctx.save_for_backward(x, mask, weight, bias, *output[1:], *labels)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.counts, ctx.formula = counts, formula


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None, None, [None] * len(ctx.counts), [None] * len(ctx.counts), None
    x, mask, weight, bias, count, mean, m2, low, *labels = ctx.saved_tensors
    given = (x, mask, weight, bias, labels, ctx.counts, ctx.formula)
    gradients = iter(torch.ops.flexnorm.backward(*given, count, mean, m2, low, dy))
    dx = next(gradients)
    dmask = next(gradients) if mask is not None and mask.is_floating_point() else None
    dweight, dbias = (None if t is None else next(gradients) for t in (weight, bias))
    return dx, dmask, dweight, dbias, [None] * len(labels), [None] * len(labels), None


torch.library.register_autograd("flexnorm::forward", _differentiate, setup_context=_keep, lib=_LIBRARY)
