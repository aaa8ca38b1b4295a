"""What a kernel does: its entry points as operators of torch, `torch.ops.flexnorm.*`, with their derivatives.

A graph holds no Python objects, so an operator takes tensors, numbers, and the user's own texts. Eager calls go to the
kernels directly, which is many times faster; both run the same kernels. No tracer looks into an operator: `traced.py`
says what it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..kernels import ROOMS, Gradients, Operands, Recipe, Sums, aten, choose
from ..partition import Partition, flat, partitions_of
from ..spec import Spec
from ..statistics import Moments
from ..watching import unwatched
from .arguments import Formula, Options
from .computing import Bound, Closer, Composed, How

# The overload of every operator. Other arguments, or results of other shapes, are another version, because compilers
# keep graphs beyond a process. `refused.py` has the operators of the earlier one.
VERSION = "v3"

LIBRARY: Any = torch.library.Library("flexnorm", "FRAGMENT")  # type: ignore[no-untyped-call]
OPERATORS: Any = torch.ops.flexnorm
T = TypeVar("T")


# --- what every entry point takes ------------------------------------------------------------------------------------

NAMED = "str[] size_names, SymInt[] sizes, str[] label_names, Tensor[] ids, Tensor[] tables, SymInt[] counts"
MOMENTS = "Tensor count, Tensor mean, Tensor m2, Tensor low"
_GIVEN = (
    "Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, str pattern, str? affine, bool center, bool scale, "
    f"float eps, str? activation, {NAMED}"
)


class Given(NamedTuple):
    """A call of one stage, in the order of the schemas. The labels are those that the pattern and the affine read."""

    x: Tensor
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    pattern: str
    affine: str | None
    center: bool
    scale: bool
    eps: float
    activation: str | None
    size_names: Sequence[str]
    sizes: Sequence[int]
    label_names: Sequence[str]
    ids: Sequence[Tensor]
    tables: Sequence[Tensor]  # offsets and order of every label; none, where one of them is not made yet
    counts: Sequence[int]

    @classmethod
    def of(cls, formula: Formula, operands: Operands, labels: Mapping[str, Partition]) -> Given:
        """The call of a formula with one affine stage at most."""
        affine = formula.affines[0].text if formula.affines else None
        o = formula.options
        options = (o.center, o.scale, o.eps, o.activation)
        sizes = ([name for name, _ in formula.sizes], [size for _, size in formula.sizes])
        named: Any = (*sizes, *flat((name, labels[name]) for name in formula.lookups))
        return cls(*operands, formula.spec.text, affine, *options, *named)

    @property
    def formula(self) -> Formula:
        """What it asks for. The last ones are kept."""
        options = (self.center, self.scale, self.eps, self.activation)
        sizes = tuple(zip(self.size_names, self.sizes, strict=True))
        kept = all(type(size) is int for size in self.sizes)  # symbols cannot be kept
        return (_formula if kept else _formula.__wrapped__)(self.pattern, self.affine, options, sizes)

    @property
    def partitions(self) -> dict[str, Partition]:
        """Its labels."""
        return dict(zip(self.label_names, partitions_of(self.ids, self.tables, self.counts), strict=True))

    @property
    def operands(self) -> Operands:
        """Its tensors, without the labels."""
        return Operands(self.x, self.mask, self.weight, self.bias)

    def prepare(self, labels: Mapping[str, Partition] | None = None) -> Recipe:
        """What a backend other than the library is told."""
        formula = self.formula
        params = [(self.weight, self.bias)] if formula.affines else []
        return formula.prepare(self.x, self.mask, params, self.partitions if labels is None else labels)[0]

    def computed(self, f: Callable[[How, Operands], T]) -> T:
        """f of the call as the library computes it, or else as a backend does."""
        formula, partitions = self.formula, self.partitions
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
        recipe = self.prepare(partitions)
        plan = choose(recipe, self.operands, differentiated=True)
        return f(Composed(recipe, ROOMS[plan.room]), self.operands)


@lru_cache(maxsize=1024)
def _formula(
    pattern: str,
    affine: str | None,
    options: tuple[bool, bool, float, str | None],
    sizes: tuple[tuple[str, int], ...],
) -> Formula:
    spec = Spec.parse(pattern)
    affines = [] if affine is None else [spec.read(affine, "affine")]
    return Formula(spec, Options(*options), affines, dict(sizes))


def operator(schema: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Makes a function the operator of its name."""

    def made(body: Callable[..., T]) -> Callable[..., T]:
        name = f"{body.__name__}.{VERSION}"
        LIBRARY.define(name + schema)
        # Below autograd, where nothing can be differentiated again: the kernels must not try.
        LIBRARY.impl(name, torch.no_grad()(body), "CompositeExplicitAutograd")
        return body

    return made


def of_given(body: Callable[..., T]) -> Callable[..., T]:
    """A function of `Given` and more, as one whose first arguments are the fields of `Given`."""
    fields = len(Given._fields)

    @wraps(body)
    def taken(*arguments: Any) -> T:
        return body(Given(*arguments[:fields]), *arguments[fields:])

    return taken


# --- the entry points ------------------------------------------------------------------------------------------------


@operator(f"({_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
@of_given
def forward(given: Given) -> tuple[Tensor, ...]:
    """y, and the moments."""

    def both(how: How, operands: Operands) -> tuple[Tensor, ...]:
        y, *kept = how.forward(*operands)
        return y, *_fields(how.moments(operands.x, tuple(kept)))

    return given.computed(both)


@operator(f"({_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor)")
@of_given
def statistics(given: Given) -> tuple[Tensor, ...]:
    """The moments of x."""
    return _fields(given.computed(lambda how, operands: how.statistics(operands.x, operands.mask)))


@operator(f"({_GIVEN}, {MOMENTS}) -> Tensor")
@of_given
def apply(given: Given, *fields: Tensor) -> Tensor:
    """y by these moments."""
    return given.computed(lambda how, operands: how.apply(operands, Moments(*fields)))


@operator(f"({_GIVEN}, {MOMENTS}, Tensor dy) -> Tensor[]")
@of_given
def backward(given: Given, count: Tensor, mean: Tensor, m2: Tensor, low: Tensor, dy: Tensor) -> list[Tensor]:
    """The gradients of x, of a floating mask, of weight and of bias, of those that there are."""
    m = Moments(count, mean, m2, low)

    def every(how: How, operands: Operands) -> Gradients:
        return how.backward(operands, how.keep(operands.x, m), dy, True)

    return _present(*given.computed(every))


@operator(f"({_GIVEN}, {MOMENTS}, Tensor dy) -> Tensor[]")
@of_given
def backward_sums(given: Given, count: Tensor, mean: Tensor, m2: Tensor, low: Tensor, dy: Tensor) -> list[Tensor]:
    """The sums over the sets, then the gradients of weight and of bias, of those that there are."""
    m = Moments(count, mean, m2, low)
    sums = given.computed(lambda how, operands: how.backward_sums(operands, m, dy))
    grad, grad_xhat = (t.expand(mean.shape).clone(memory_format=ROWS) for t in sums[:2])
    return _present(grad, grad_xhat, *sums[2:])


@operator(f"({_GIVEN}, {MOMENTS}, Tensor? dy, Tensor? grad, Tensor? grad_xhat) -> Tensor[]")
@of_given
def backward_dx(
    given: Given,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    low: Tensor,
    dy: Tensor | None,
    grad: Tensor | None,
    grad_xhat: Tensor | None,
) -> list[Tensor]:
    """The gradients of x and of a floating mask, if there is one. Without sums the moments do not depend on x."""
    m = Moments(count, mean, m2, low)
    sums = None if grad is None or grad_xhat is None else Sums(grad, grad_xhat, None, None)
    return _present(*given.computed(lambda how, operands: how.backward_dx(operands, m, dy, sums)))


@operator(f"({MOMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
def cumulative(*fields: Tensor) -> tuple[Tensor, ...]:
    """The moments up to and with each place of the last axis."""
    return _fields(Moments(*fields).cumulative())


@operator(f"({MOMENTS}, Tensor dcount, Tensor dmean, Tensor dm2) -> Tensor[]")
def backward_cumulative(
    count: Tensor, mean: Tensor, m2: Tensor, low: Tensor, dcount: Tensor, dmean: Tensor, dm2: Tensor
) -> list[Tensor]:
    """The gradients of mean and m2, and of a floating count. The moments are computed again."""
    weighed = count.is_floating_point()
    with torch.enable_grad():
        count, mean, m2 = (t.detach().requires_grad_(t.is_floating_point()) for t in (count, mean, m2))
        m = Moments(count, mean, m2, low).cumulative()
        inputs, outputs = [mean, m2] + [count] * weighed, [m.mean, m.m2] + [m.count] * weighed
        found = torch.autograd.grad(outputs, inputs, [dmean, dm2] + [dcount] * weighed)
    return [t.contiguous() for t in found]


ROWS = torch.contiguous_format


def low_of(m: Moments) -> Tensor:
    """The rounding error of the mean; zeros if it is not known."""
    return torch.zeros_like(m.mean) if m.low is None else m.low


def _fields(m: Moments) -> tuple[Tensor, ...]:
    """Count, mean, M2 and low, each with memory of its own, as results of operators have."""
    return tuple(t.clone(memory_format=ROWS) for t in (m.count, m.mean, m.m2, low_of(m)))


def _present(x: Tensor, *others: Tensor | None) -> list[Tensor]:
    """The tensors that there are; all but x contiguous, as tracers are told."""
    return [x, *(t.contiguous() for t in others if t is not None)]


# --- their derivatives -----------------------------------------------------------------------------------------------


def _keep_given(ctx: Any, given: Given, moments: tuple[Tensor, ...]) -> None:
    """Keeps tensors where hooks and checkpointing look for them, and the rest beside them."""
    ctx.save_for_backward(*given.operands, *moments, *given.ids, *given.tables)
    none: Any = dict.fromkeys(Operands._fields)
    ctx.given = given._replace(**none, ids=[], tables=[])
    ctx.no_gradients = [_no_gradient(value) for value in given[len(Operands._fields) :]]


def _no_gradient(value: Any) -> Any:
    """torch takes a list of tensors, and an empty one, for a tree."""
    is_tree = isinstance(value, list) and all(isinstance(item, Tensor) for item in value)
    return [None] * len(value) if is_tree else None


def _kept(ctx: Any) -> tuple[Given, Moments]:
    """What the operator was given, and the moments."""
    x, mask, weight, bias, count, mean, m2, low, *labels = ctx.saved_tensors
    n = len(ctx.given.label_names)
    operands = {"x": x, "mask": mask, "weight": weight, "bias": bias}
    return ctx.given._replace(**operands, ids=labels[:n], tables=labels[n:]), Moments(count, mean, m2, low)


def _gradients(ctx: Any, dx: Any = None, dmask: Any = None, dweight: Any = None, dbias: Any = None) -> tuple[Any, ...]:
    """The gradients of all fields of `Given`."""
    return dx, dmask, dweight, dbias, *ctx.no_gradients


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep_given(ctx, Given(*inputs), output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dy is None:
        return _gradients(ctx)
    given, m = _kept(ctx)
    return _gradients(ctx, *_each(given, OPERATORS.backward.v3(*given, *m._fields, dy)))


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep_given(ctx, Given(*inputs), output)
    count, _, _, low = output
    ctx.mark_non_differentiable(*([low] if count.is_floating_point() else [count, low]))


def _differentiate_statistics(ctx: Any, dcount: Tensor | None, dmean: Tensor, dm2: Tensor, _: None) -> tuple[Any, ...]:
    given, m = _kept(ctx)
    sums = aten.backward_statistics(given.formula.options, m, dmean, dm2)
    found = OPERATORS.backward_dx.v3(*given, *m._fields, None, sums.grad, sums.grad_xhat)
    if len(found) == 1:
        return _gradients(ctx, found[0])
    recipe, mask = given.prepare(), given.mask
    assert recipe.mask is not None
    assert mask is not None
    # That of a mean and a variance. The weight of a set counts by itself, and m2 is so many variances.
    total = dm2 * m.var if dcount is None else dcount + dm2 * m.var
    own = recipe.mask.outward(recipe.mask.sum(recipe.sets.spread(recipe.sets.inward(total)))).to(mask.dtype)
    return _gradients(ctx, found[0], found[1] + own)


def _keep_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    fields = len(Given._fields)
    _keep_given(ctx, Given(*inputs[:fields]), inputs[fields:])
    ctx.set_materialize_grads(False)


def _differentiate_apply(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return *_gradients(ctx), None, None, None, None
    given, m = _kept(ctx)
    grad, grad_xhat, *of_params = OPERATORS.backward_sums.v3(*given, *m._fields, dy)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = OPERATORS.backward_dx.v3(*given, *m._fields, dy, None, None)[0]
    _, _, *params = _each(given._replace(mask=None), [None, *of_params])
    of_moments = aten.backward_moments(given.formula.options, m, Sums(grad, grad_xhat, None, None))
    return *_gradients(ctx, dx, None, *params), *of_moments, None


def _each(given: Given, gradients: Sequence[Any]) -> list[Any]:
    """The gradients of x, of a floating mask, of weight and of bias, None where there is none."""
    found = iter(gradients)
    floating = given.mask is not None and given.mask.is_floating_point()
    has = (True, floating, given.weight is not None, given.bias is not None)
    return [next(found) if there else None for there in has]


def _keep_cumulative(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    count, _, _, low = output
    ctx.mark_non_differentiable(*([low] if count.is_floating_point() else [count, low]))


def _differentiate_cumulative(ctx: Any, dcount: Tensor | None, dmean: Tensor, dm2: Tensor, _: None) -> tuple[Any, ...]:
    count, *others = ctx.saved_tensors
    dcount = torch.zeros_like(dmean) if dcount is None else dcount
    dmean, dm2, *of_count = OPERATORS.backward_cumulative.v3(count, *others, dcount, dmean, dm2)
    return of_count[0] if of_count else None, dmean, dm2, None


for _body, _keep, _differentiate in (
    (forward, _keep_forward, _differentiate_forward),
    (statistics, _keep_statistics, _differentiate_statistics),
    (apply, _keep_apply, _differentiate_apply),
    (cumulative, _keep_cumulative, _differentiate_cumulative),
):
    _name = f"flexnorm::{_body.__name__}.{VERSION}"
    torch.library.register_autograd(_name, _differentiate, setup_context=_keep, lib=LIBRARY)
