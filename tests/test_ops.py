"""The operators: what torch asks of one, and that they compute what the rooms do."""

import cases
import pytest
import torch

from flexnorm import normalize
from flexnorm.calls.arguments import Formula, Options
from flexnorm.calls.operators import OPERATORS, VERSION, Given
from flexnorm.kernels import aten
from flexnorm.spec import Spec

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def arguments(case, **kwargs):
    """What an operator takes, and the recipe and operands of the rooms."""
    x, given = cases.arguments(case, **kwargs)
    spec = Spec.parse(case.pattern)
    affines = [spec.read(case.affine, "affine")] if case.affine else []
    formula = Formula(spec, Options(**case.options), affines, case.sizes)
    mask, weight, bias = (given.get(name) for name in ("mask", "weight", "bias"))
    recipe, operands = formula.prepare(x, mask, [(weight, bias)] if affines else [], given["labels"])
    return Given.of(formula, operands, given["labels"]), (recipe, operands)


@pytest.mark.parametrize("case", **cases.each)
def test_operators_are_the_composition(case):
    given, (recipe, operands) = arguments(case)
    dy = torch.randn(case.shape, dtype=torch.float64)
    expected, kept = aten.forward(recipe, operands)
    m = aten.moments(recipe, operands, kept).outward(recipe.sets)
    close = {"rtol": 1e-9, "atol": 1e-10}
    y, *fields = OPERATORS.forward.v3(*given)
    torch.testing.assert_close(y, expected, **close)
    for ours, theirs in zip(fields[:3], (m.count, m.mean, m.m2), strict=True):
        torch.testing.assert_close(ours, theirs.expand(ours.shape), **close)
    assert all(torch.equal(a, b) for a, b in zip(OPERATORS.statistics.v3(*given), fields, strict=True))
    assert torch.equal(OPERATORS.apply.v3(*given, *fields), y)
    gradients = OPERATORS.backward.v3(*given, *fields, dy)
    wanted = [t for t in aten.backward(recipe, operands, kept, dy) if t is not None]
    sums = OPERATORS.backward_sums.v3(*given, *fields, dy)
    parts = OPERATORS.backward_dx.v3(*given, *fields, dy, *sums[:2]) + sums[2:]
    for ours, split, theirs in zip(gradients, parts, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
        torch.testing.assert_close(split, theirs, **close)


def test_a_graph_of_another_version_is_refused():
    """Inductor keeps compiled graphs on disk, by the texts that they hold."""
    *given, text = arguments(cases.by_name["group"])[0]
    for other in (text.replace("(2, ", "(1, ", 1), text.replace("(2, ", "(", 1)):
        with pytest.raises(ValueError, match="is run by the version of flexnorm"):
            OPERATORS.forward.v3(*given, other)


@pytest.mark.parametrize("case", cases.CASES[::5], ids=[case.name for case in cases.CASES[::5]])
def test_operators_are_what_torch_asks_of_one(case):
    given, _ = arguments(case, dtype=torch.float32)
    _, *fields = OPERATORS.forward.v3(*given)
    dy = torch.randn(case.shape)
    sums = OPERATORS.backward_sums.v3(*given, *fields, dy)
    torch.library.opcheck(OPERATORS.forward.v3, given, test_utils=CHECKS)
    torch.library.opcheck(OPERATORS.statistics.v3, given, test_utils=CHECKS)
    torch.library.opcheck(OPERATORS.apply.v3, (*given, *fields), test_utils=CHECKS)
    torch.library.opcheck(OPERATORS.backward.v3, (*given, *fields, dy), test_utils=CHECKS)
    torch.library.opcheck(OPERATORS.backward_sums.v3, (*given, *fields, dy), test_utils=CHECKS)
    torch.library.opcheck(OPERATORS.backward_dx.v3, (*given, *fields, dy, *sums[:2]), test_utils=CHECKS)


def test_gradients_of_the_operator_are_those_of_eager():
    case = cases.by_name["weights"]
    given, _ = arguments(case, requires_grad=True)
    OPERATORS.forward.v3(*given)[0].square().sum().backward()
    x, kwargs = cases.arguments(case, requires_grad=True)
    normalize(x, case.pattern, kwargs.pop("mask"), **kwargs).square().sum()
    ours = [t.grad for t in given[:4]]
    x, kwargs = cases.arguments(case, requires_grad=True)
    leaves = cases.leaves(x, kwargs)
    normalize(x, case.pattern, kwargs.pop("mask"), **kwargs).square().sum().backward()
    for a, b in zip(ours, leaves, strict=True):
        torch.testing.assert_close(a, b.grad)


def test_operators_are_compiled_whole():
    case = cases.by_name["token_group"]
    given, _ = arguments(case, dtype=torch.float32)
    x, *others = given

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        return OPERATORS.forward.v3(x, *others)[0] * 2

    x = x.requires_grad_()
    y = f(x)
    torch.testing.assert_close(y, OPERATORS.forward.v3(x, *others)[0] * 2)
    (a,) = torch.autograd.grad(y.square().sum(), x)
    (b,) = torch.autograd.grad((OPERATORS.forward.v3(x, *others)[0] * 2).square().sum(), x)
    torch.testing.assert_close(a, b)


class _Layer(torch.nn.Module):
    def forward(self, x, mask):
        return normalize(x, "b (g c) t, b t -> b g", mask, g=2)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
def test_a_compiled_graph_holds_the_operator_and_an_exported_one_does_not():
    x, mask = torch.randn(2, 4, 6), torch.rand(2, 6) < 0.7
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    y = torch.compile(_Layer(), backend=backend)(x, mask)
    assert f"flexnorm.normalize.{VERSION}" in seen
    torch.testing.assert_close(y, _Layer()(x, mask))
    exported = torch.export.export(_Layer(), (x, mask))
    assert all("flexnorm" not in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x, mask), y)
