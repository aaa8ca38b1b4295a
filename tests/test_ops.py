"""The operators: what torch asks of one, and that they compute what the rooms do."""

import io
from contextlib import nullcontext

import cases
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flexnorm import Norm, Partition, SpecError, moments, normalize, partition
from flexnorm import given as given_around
from flexnorm.calls.arguments import Formula, Options
from flexnorm.calls.operators import OPERATORS, VERSION, Given
from flexnorm.calls.traced import Call
from flexnorm.kernels import aten
from flexnorm.library import library
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
    again = OPERATORS.apply.v3(*given, *fields)
    assert torch.equal(again, y) or isinstance(library(), str)  # torch's norms take no moments: the composition does
    torch.testing.assert_close(again, y, **close)
    gradients = OPERATORS.backward.v3(*given, *fields, dy)
    wanted = [t for t in aten.backward(recipe, operands, kept, dy) if t is not None]
    sums = OPERATORS.backward_sums.v3(*given, *fields, dy)
    parts = OPERATORS.backward_dx.v3(*given, *fields, dy, *sums[:2]) + sums[2:]
    for ours, split, theirs in zip(gradients, parts, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
        torch.testing.assert_close(split, theirs, **close)


X = torch.randn(2, 6)
FIELDS = [torch.zeros(2)] * 4
SAID = "(2, 'n c -> n', (), (), (True, True, 1e-05, None))"  # what an operator was told before
GIVEN = (X, None, None, None, [], [], SAID)
EARLIER = {
    "forward": GIVEN,
    "statistics": GIVEN,
    "apply": (*GIVEN, *FIELDS),
    "backward": (*GIVEN, *FIELDS, X),
    "backward_sums": (*GIVEN, *FIELDS, X),
    "backward_dx": (*GIVEN, *FIELDS, X, None, None),
    "normalize": (X, None, [], [], [], 1e-5, SAID),
    "tracked": (X, None, [], [], [], 1e-5, SAID),
    "moments": (X, None, [], [], SAID),
    "coarsen": (FIELDS, [], [], SAID),
    "refine": (FIELDS, [2], [], [], SAID),
}


@pytest.mark.parametrize("name", EARLIER)
def test_a_graph_of_another_version_is_refused(name):
    """A graph holds an operator by its name, or by its overload, which was the default one."""
    operator, more = getattr(OPERATORS, name), {"moments": []} if name == "normalize" else {}
    for called in (operator, operator.default):
        with pytest.raises(SpecError, match=r"is run by the version of flexnorm(.|\n)*compile it again"):
            called(*EARLIER[name], **more)


class _Cosine(torch.nn.Module):
    def forward(self, x):
        return x.cos()


def test_a_saved_program_of_another_version_is_refused():
    """It loads as it was saved, and says what to do where it runs."""
    program = torch.export.export(_Cosine(), (X,))
    (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
    x = node.args[0]
    node.target, node.args = OPERATORS.apply.default, (x, None, None, None, [], [], SAID, x, x, x, x)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with pytest.raises(SpecError, match="is run by the version of flexnorm"):
        loaded(X)


TYPED = (
    "str[] size_names, SymInt[] sizes, str[] label_names, Tensor[] ids, Tensor[] tables, SymInt[] counts",
    "str pattern",
)


def test_schemas_are_typed():
    every = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("flexnorm::")]
    found = {s.name.removeprefix("flexnorm::"): s for s in every if s.overload_name == VERSION}
    assert found.keys() == EARLIER.keys() | {"cumulative", "backward_cumulative"}
    assert {(s.name, s.overload_name) for s in every if s.overload_name != VERSION} == {
        (f"flexnorm::{name}", "") for name in EARLIER
    }
    for name, schema in found.items():
        names = [argument.name for argument in schema.arguments]
        assert not {"text", "formula"} & set(names)
        if name in EARLIER:
            assert all(typed in str(schema) for typed in TYPED)
        if name in ("normalize", "tracked", "moments"):
            assert names[: len(Call._fields)] == list(Call._fields)
        elif name in EARLIER.keys() - {"coarsen", "refine"}:
            assert names[: len(Given._fields)] == list(Given._fields)


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


# --- order and offsets of labels -------------------------------------------------------------------------------------


@pytest.fixture
def grouped(monkeypatch):
    """The sizes of ids that were ordered and counted by the library."""
    if isinstance(library(), str):
        pytest.skip(library())
    seen, make = [], partition._grouped

    def grouped(ids, count):
        seen.append(tuple(ids.shape))
        return make(ids, count)

    monkeypatch.setattr(partition, "_grouped", grouped)
    torch._dynamo.reset()
    return seen


X8 = torch.randn(8, 3)
IDS = torch.tensor([3, 0, 1, 1, 0, 3, 3, 1])  # not sorted, and 2 is empty
PARTITIONS = {
    "unsorted": lambda: Partition(IDS, 5),
    "sorted": lambda: Partition(IDS.sort().values, 5),
    "sizes": lambda: Partition.from_sizes([3, 0, 5]),
    "offsets": lambda: Partition.from_offsets([0, 3, 3, 8]),
}


def _by_argument(x, label):
    return normalize(x, "v c -> graph[v] c", graph=label)


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("way", ["argument", "given", "layer", "coarsen"])
def test_a_compiled_graph_takes_order_and_offsets_from_the_partition(way, name, grouped):
    """Forward and backward are those of eager calls, and nothing orders or counts the ids again."""
    label, x = PARTITIONS[name](), torch.randn(8, 3, requires_grad=True)
    norm = Norm("v c -> graph[v] c", affine="graph[v]", graph=label) if way == "layer" else Norm("v c -> graph[v] c")
    ways = {
        "argument": lambda x, label: normalize(x, "v c -> graph[v] c", graph=label),
        "given": lambda x, label: norm(x),
        "layer": lambda x, label: norm(x),
        "coarsen": lambda x, label: moments(x, "v c -> v c").coarsen("v c -> graph[v] c", graph=label).mean,
    }
    compiled = torch.compile(ways[way], fullgraph=True, backend="aot_eager")
    grouped.clear()
    around = given_around(graph=label) if way == "given" else nullcontext()
    with around:
        y = compiled(x, label)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        assert not grouped
        z = ways[way](x, label)
    assert torch.equal(y, z)
    (expected,) = torch.autograd.grad(z.square().sum(), x)
    if way == "coarsen":  # eager sums over sets are in double
        torch.testing.assert_close(dx, expected)
    else:
        assert torch.equal(dx, expected)


def test_labels_that_are_made_in_a_graph_are_ordered_where_they_are_used(grouped):
    def f(x, ids):
        return normalize(x, "v c -> graph[v] c", graph=Partition(ids, 5))

    x = torch.randn(8, 3, requires_grad=True)
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x, IDS)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert grouped == [(8,), (8,)]
    z = f(x, IDS)
    assert torch.equal(y, z)
    assert torch.equal(dx, torch.autograd.grad(z.square().sum(), x)[0])


def test_a_graph_of_one_order_serves_no_other(grouped):
    """Sorted ids of a call come without an order: the graph is made again, and not for every batch."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_by_argument, fullgraph=True, backend=counter)
    for n in range(11, 17):
        for ids in (torch.arange(3 * n) % n, torch.arange(3 * n) // 3):
            x, label = torch.randn(3 * n, 4), Partition(ids, n)
            grouped.clear()
            y = compiled(x, label)
            assert not grouped
            assert torch.equal(y, _by_argument(x, label))
    assert counter.frame_count <= 4


def test_tables_that_fit_no_ids_are_made_again(grouped):
    """They are read without a check, so their sizes are looked at first."""
    offsets, order = Partition(IDS, 5)._tables
    assert order.numel() == 8
    for tables in ((offsets[:-1], order), (offsets, order[:-1]), (torch.arange(0), order)):
        label = Partition._made(IDS, 5, tables)
        grouped.clear()
        assert torch.equal(_by_argument(X8, label), _by_argument(X8, Partition(IDS, 5)))
        assert len(grouped) == 2


@pytest.mark.parametrize("built", ["before", "in it"])
def test_order_and_offsets_of_inference_mode_are_saved_for_backward(built):
    """A layer may be evaluated first, and trained later."""
    with torch.inference_mode(built == "in it"):
        norm = Norm("v c -> graph[v] c", graph=Partition._made(IDS, 5))
    with torch.inference_mode():
        norm(X8)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: norm(x), fullgraph=True, backend="aot_eager")
    x = X8.clone().requires_grad_()
    dy = torch.randn(8, 3)
    (dx,) = torch.autograd.grad(compiled(x), x, dy)
    assert torch.equal(dx, torch.autograd.grad(norm(x), x, dy)[0])


def test_one_graph_serves_sorted_and_unsorted_ids_of_a_layer(grouped):
    norm = Norm("v c -> graph[v] c", graph=Partition.from_sizes([3, 5]))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: norm(x), fullgraph=True, backend=counter)
    for ids in (None, [0, 1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]):
        if ids is not None:
            norm.load_state_dict({"graph_ids": torch.tensor(ids)})
        grouped.clear()
        y = compiled(X8)
        assert not grouped
        assert torch.equal(y, norm(X8))
    assert counter.frame_count == 1
