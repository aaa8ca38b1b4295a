"""Statistics over ranks: real gloo processes against the loops of one, values, all gradients, errors."""

import copy
import math
import re

import on_ranks
import oracle
import pytest
import torch
from torch import nn

from flexnorm import Norm, Partition, SpecError, calibrate, moments, normalize
from flexnorm.calls.ranks import Sharding
from flexnorm.conversion import SyncBatchNorm, convert_sync_batchnorm


@pytest.fixture(scope="module")
def two():
    processes = on_ranks.Processes(2)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def three():
    processes = on_ranks.Processes(3)
    yield processes
    processes.close()


def case(
    pattern, shape, sharded, cut, sizes, *, mask=None, labels=(), affine=None, dtype=torch.float32, offset=3.0, **o
):
    """A call of `normalize`; `cut` is the dimension of each tensor along which ranks have parts."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator, dtype=dtype) + offset
    tensors = {"x": x, "dy": torch.randn(shape, generator=generator, dtype=dtype)}
    if mask is not None:
        kind, mask_shape = mask
        values = torch.rand(mask_shape, generator=generator)
        tensors["mask"] = values < 0.6 if kind == "bool" else values.to(x.real.dtype)
    counts = {}
    for name, ids_shape, count in labels:
        tensors[name] = torch.randint(0, count, ids_shape, generator=generator)
        counts[name] = count
    if affine is not None:
        text, parameter = affine
        o["affine"] = text
        for name in ("weight", "bias"):
            tensors[name] = torch.randn(parameter, generator=generator, dtype=dtype)
    return {
        "pattern": pattern, "tensors": tensors, "cut": {"x": cut["x"], "dy": cut["x"], **cut}, "sizes": sizes,
        "labels": counts, "sharded": sharded, "options": o,
    }  # fmt: skip


CASES = {
    "images over the batch": (
        "n c h w -> c", (5, 3, 4, 2), "n", {"x": 0}, {"affine": ("c", (3,))}, {2: [4, 1], 3: [2, 0, 3]},
    ),
    "images over rows": (
        "n (g c) h w -> n g", (2, 4, 5, 3), "h", {"x": 2}, {"affine": ("(g c)", (4,)), "g": 2},
        {2: [2, 3], 3: [1, 0, 4]},
    ),
    "masked sequences over time": (
        "b (g c) t, b t -> b g", (3, 4, 7), "t", {"x": 2, "mask": 1},
        {"mask": ("bool", (3, 7)), "affine": ("(g c)", (4,)), "g": 2}, {2: [6, 1], 3: [3, 0, 4]},
    ),
    "weighted sequences over time": (
        "b c t, b t -> b c", (2, 3, 6), "t", {"x": 2, "mask": 1}, {"mask": ("float", (2, 6))},
        {2: [1, 5], 3: [2, 2, 2]},
    ),
    "graphs over nodes": (
        "v (g c) -> graph[v] g", (9, 4), "v", {"x": 0, "graph": 0},
        {"labels": [("graph", (9,), 4)], "affine": ("(g c)", (4,)), "g": 2}, {2: [2, 7], 3: [4, 0, 5]},
    ),
    "types of nodes with their parameters": (
        "v c -> type[v] c", (8, 2), "v", {"x": 0, "type": 0},
        {"labels": [("type", (8,), 3)], "affine": ("type[v] c", (3, 2))}, {2: [3, 5], 3: [1, 2, 5]},
    ),
    "features over ranks, with their parameters": (
        "n c -> n", (3, 6), "c", {"x": 1, "weight": 0, "bias": 0}, {"affine": ("c", (6,))}, {2: [2, 4], 3: [1, 3, 2]},
    ),
    "rms": ("b t c -> b", (2, 5, 3), "t", {"x": 1}, {"center": False}, {2: [2, 3], 3: [1, 1, 3]}),
    "means": ("b t c -> b c", (2, 5, 3), "t", {"x": 1}, {"scale": False}, {2: [2, 3], 3: [1, 1, 3]}),
    "silu": (
        "n c t -> c", (4, 2, 3), "n", {"x": 0}, {"affine": ("c", (2,)), "activation": "silu"},
        {2: [1, 3], 3: [2, 1, 1]},
    ),
    "far from zero": ("n c t -> c", (4, 2, 30), "n", {"x": 0}, {"offset": 1e3}, {2: [1, 3], 3: [2, 1, 1]}),
    "apart along the ranks": ("n c t -> n c", (4, 2, 3), "n", {"x": 0}, {}, {2: [1, 3], 3: [2, 1, 1]}),
}  # fmt: skip


def check(processes, made, tolerance, run=on_ranks.sharded_normalize):
    """The parts of all ranks, against the loops; of what every rank has whole, the gradients add up."""
    results = processes.run(run, made)
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in made["tensors"].items()}
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if t.is_floating_point() and n != "dy"}
    x, dy = tensors.pop("x"), tensors.pop("dy")
    labels = {name: Partition(tensors.pop(name), count) for name, count in made["labels"].items()}
    options = dict(made["options"])
    sizes = {"g": options.pop("g")} if "g" in options else {}
    expected = oracle.normalize(x, made["pattern"], labels=labels, sizes=sizes, **tensors, **options)
    gradients = dict(zip(leaves, torch.autograd.grad(expected, list(leaves.values()), dy), strict=True))
    y = torch.cat([y for y, _ in results], made["cut"]["x"])
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        parts, cut = [g[name] for _, g in results], made["cut"].get(name)
        ours = sum(parts) if cut is None else torch.cat(parts, cut)
        most = max(1.0, float(gradient.detach().abs().max()))
        torch.testing.assert_close(ours.double(), gradient, rtol=tolerance, atol=tolerance * most)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [2, 3])
def test_equals_one_process(name, world, request):
    processes = request.getfixturevalue({2: "two", 3: "three"}[world])
    pattern, shape, sharded, cut, options, sizes = CASES[name]
    # In float64 all roundings are far below 1e-9: it is the formula, weights and all.
    check(processes, case(pattern, shape, sharded, cut, sizes[world], dtype=torch.float64, **options), 1e-9)
    # In float32: 1e-6 for y of order 1, and what an offset costs any formula, 2^-24 * |mean| / sigma.
    offset = options.get("offset", 3.0)
    check(processes, case(pattern, shape, sharded, cut, sizes[world], **options), 1e-6 * max(1, offset / 10))


def test_several_axes_at_once(two):
    """Each rank has another block of rows and columns: a set is what all blocks hold of it."""
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    blocks = [x[:1, :, :2], x[1:, :, 2:]]
    made = {
        "pattern": "n c h -> c", "tensors": {"x": x, "dy": x}, "cut": {}, "sizes": None, "labels": {},
        "sharded": ("n", "h"), "options": {},
    }  # fmt: skip
    results = two.run(on_ranks.blocks, made, blocks)
    flat = torch.cat([b.transpose(1, 2).reshape(-1, 3) for b in blocks])
    expected = oracle.normalize(flat, "n c -> c")
    ours = torch.cat([y.transpose(1, 2).reshape(-1, 3) for y in results])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_complex_numbers_over_ranks(two):
    x = torch.randn(5, 3, dtype=torch.complex128) + (2 - 1j)
    d = x - x.mean(0)
    expected = d / (d.abs().square().mean(0) + 1e-5).sqrt()
    made = case("n c -> c", (5, 3), "n", {"x": 0}, [2, 3], dtype=torch.float64)
    made["tensors"] = {"x": x, "dy": torch.randn_like(x)}
    results = two.run(on_ranks.sharded_normalize, made)
    torch.testing.assert_close(torch.cat([y for y, _ in results]), expected, rtol=1e-10, atol=1e-10)
    leaf = x.clone().requires_grad_()
    d = leaf - leaf.mean(0)
    y = d / (d.abs().square().mean(0) + 1e-5).sqrt()
    (dx,) = torch.autograd.grad(y, leaf, made["tensors"]["dy"])
    torch.testing.assert_close(torch.cat([g["x"] for _, g in results]), dx, rtol=1e-9, atol=1e-9)


def test_double_backward(two):
    x = torch.randn(5, 2, dtype=torch.float64)
    ours = torch.cat(two.run(on_ranks.penalty, x, [2, 3]))
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(oracle.normalize(leaf, "n c -> c").pow(3).sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(dx.pow(2).sum(), leaf)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_moments_merge_over_ranks(three):
    x, weights = torch.randn(6, 3, dtype=torch.float64) + 5, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    results = three.run(on_ranks.moments_of, x, [1, 0, 5], weights)
    leaf = x.clone().requires_grad_()
    mean = leaf.mean(0)
    m2 = (leaf - mean).square().sum(0)
    # The loss is summed over the ranks, each of which has the same one.
    (dx,) = torch.autograd.grad(3 * (mean * weights + m2 * weights.flip(0)).sum(), leaf)
    for fields, _, _ in results:
        for count, ours, squares in fields:
            assert count.tolist() == [6, 6, 6]
            torch.testing.assert_close(ours, mean.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(squares, m2.detach(), rtol=1e-12, atol=1e-12)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([r[i] for r in results]), dx, rtol=1e-9, atol=1e-9)


def test_sub_groups(three):
    x = torch.randn(7, 4, dtype=torch.float32)
    norm = Norm("n c -> c", c=4, affine="c", track_running_stats=True)
    expected = norm(x)
    first, outside, last = three.run(on_ranks.subgroups, x, [3, 0, 4], [0, 2])
    torch.testing.assert_close(torch.cat([first[0], last[0]]), expected.detach(), rtol=2e-6, atol=2e-6)
    assert "this rank is not in the process group" in outside
    for _, mean, var in (first, last):
        torch.testing.assert_close(mean, norm.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var, norm.running_var, rtol=1e-6, atol=1e-6)


# --- errors ----------------------------------------------------------------------------------------------------------

ERRORS = {  # of one rank: what the guilty rank raises, and what the other
    "shape": ("ShapeError", "axis 'c' has size 2", "RuntimeError", "rank 1 has failed.*axis 'c' has size 2"),
    "dtype": ("SpecError", "floating or complex", "RuntimeError", "rank 1 has failed"),
    "label": ("ShapeError", "ids are from 0", "RuntimeError", "rank 1 has failed.*ids are from 0"),
    "weights": ("ShapeError", "finite and 0 or more", "RuntimeError", "rank 1 has failed"),
    "sets": ("ShapeError", r"rank 0: 2 sets.*rank 1: 3 sets", "ShapeError", r"rank 0: 2 sets.*rank 1: 3 sets"),
    "count": ("ShapeError", "rank 1: 9 sets", "ShapeError", "give labels a count"),
    "gradient": ("SpecError", "on all ranks, or on none", "SpecError", "rank 0: a gradient; rank 1: no gradient"),
    "moments": ("ShapeError", "the same sets", "ShapeError", "the same sets"),
    "functional label": ("ShapeError", "ids are from 0|label 'kind'", "RuntimeError", "rank 1 has failed"),
    "floating label": ("SpecError", "ids are integers", "RuntimeError", "rank 1 has failed.*ids are integers"),
    "precision": ("ShapeError", "in torch.float64", "ShapeError", "in torch.float64"),
    "weight beside returned moments": ("ShapeError", r"shape \(3,\)", "RuntimeError", "rank 1 has failed"),
    "state": ("SpecError", "four tensors", "RuntimeError", "rank 1 has failed"),
    "shape of the state": ("ShapeError", "the state is one of these sets", "RuntimeError", "rank 1 has failed"),
    "complex running": ("SpecError", "complex where x is", "RuntimeError", "rank 1 has failed"),
    "dtensor": ("ShapeError", r"shape \(3,\)", "RuntimeError", "rank 1 has failed"),
    "dtensor with returned moments": ("ShapeError", r"shape \(3,\)", "RuntimeError", "rank 1 has failed"),
    "complex": ("ShapeError", "the same sets", "ShapeError", "the same sets"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_on_one_rank_raises_on_all_and_the_group_goes_on(kind, two):
    (other, y0), (guilty, y1) = two.run(on_ranks.what_raises, kind)
    for (name, text), (kind_, match) in ((guilty, ERRORS[kind][:2]), (other, ERRORS[kind][2:])):
        assert name == kind_, text
        assert re.search(match, text, re.DOTALL), text
    assert (y0.unique().tolist(), y1.unique().tolist()) == ([-1.0], [1.0])  # of values 0 on one and 1 on the other


def test_given_moments_ask_nobody(two):
    assert two.run(on_ranks.alone_with_given_moments)[0] == (4, 3)
    assert "shape (3,)" in two.run(on_ranks.alone_with_given_moments)[1]


def test_bad_input_is_refused_before_any_rank_is_asked():
    """There is no process group here: whatever went so far as to ask for one would say so."""
    x = torch.randn(4, 3)
    for build in (
        lambda: Norm("n c -> c", sharded="t"),
        lambda: normalize(x, "n c -> c", sharded="t"),
        lambda: moments(x, "n c -> c", sharded="t"),
    ):
        with pytest.raises(SpecError, match=r"sharded names axes of x, and 't' is none(?s:.*)one of: n, c"):
            build()
    with pytest.raises(SpecError, match="sharded names axes of x"):
        Norm("n c -> c", sharded="")
    with pytest.raises(SpecError, match="sharded names axes of x"):
        Norm("n c -> c", sharded=3)
    with pytest.raises(SpecError, match="each once"):
        Norm("n c -> c", sharded="n n")
    with pytest.raises(SpecError, match=r"apart along n(?s:.*)sharded=\"t\", with process_group="):
        Norm("n c t -> n c", sharded="n t")
    with pytest.raises(SpecError, match="one of sharded axes"):
        Norm("n c -> c", process_group=object())
    with pytest.raises(SpecError, match="one of sharded axes"):
        normalize(x, "n c -> c", process_group=object())
    with pytest.raises(SpecError, match="has all of it on one rank"):
        Norm("b c t -> c", cumulative="t", sharded="t")
    with pytest.raises(SpecError, match="has all of it on one rank"):
        normalize(x, "n c -> c", cumulative="n", sharded="n")
    with pytest.raises(RuntimeError, match=r"none is initialized(?s:.*)init_process_group"):
        Norm("n c -> c", sharded="n")(x)
    with pytest.raises(RuntimeError, match="none is initialized"):
        moments(x, "n c -> c").all_reduce()
    norm = Norm("n c -> n", sharded="n")  # no set goes on elsewhere, so no group is needed
    torch.testing.assert_close(norm(x), normalize(x, "n c -> n"))


def test_a_process_group_stays_where_it_is(two):
    for said in two.run(on_ranks.travels):
        assert len(said) == 2  # a copy, and a pickle
        assert all("copies and pickles of a layer leave it out" in text for text in said)


# --- training --------------------------------------------------------------------------------------------------------


def steps_of_one(x, target):
    model = on_ranks._net(nn.BatchNorm2d(6))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("kind", ["norm", "converted"])
def test_under_ddp(kind, two):
    x, target = torch.randn(7, 2, 4, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    expected = steps_of_one(x, target)
    for state in two.run(on_ranks.steps_of_ddp, x, target, [3, 4], kind):
        assert list(state) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-10)


def test_under_fsdp2(two):
    x, target = torch.randn(7, 2, 4, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    expected = steps_of_one(x, target)
    for state in two.run(on_ranks.steps_of_fsdp, x, target, [3, 4]):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-10)


def test_static_labels_under_fsdp2(two):
    x, norm = torch.randn(3, 6), Norm("n c -> n kind[c]", affine="c", c=6, kind=Partition.from_sizes([2, 4]))
    nn.init.normal_(norm.weight)
    model = nn.Sequential(nn.Linear(6, 6), norm)
    for y, ids in two.run(on_ranks.labels_under_fsdp, x, model.state_dict()):
        assert ids == [0, 0, 1, 1, 1, 1]
        torch.testing.assert_close(y, model(x))


def test_streams_over_ranks(two):
    x = torch.randn(5, 2, 7, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    expected = normalize(leaf, "n c t -> c", cumulative="t")
    (dx,) = torch.autograd.grad(expected.pow(3).sum(), leaf)
    results = two.run(on_ranks.steps_of_streams, x, [1, 4])
    for i, whole in enumerate((expected.detach(), expected.detach(), dx)):
        torch.testing.assert_close(torch.cat([r[i] for r in results]), whole, rtol=1e-9, atol=1e-9)


def test_calibrated_over_ranks(two):
    x = torch.randn(9, 3)
    norm = Norm("n c -> c", c=3, track_running_stats=True)
    calibrate(nn.Sequential(norm), [x])
    for mean, var in two.run(on_ranks.calibrated, x, [5, 4]):
        torch.testing.assert_close(mean, x.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var, x.var(0), rtol=1e-6, atol=1e-6)


def test_sync_batch_norm_with_ranks_that_have_nothing(three):
    x = torch.randn(4, 3, dtype=torch.float64)
    theirs = nn.BatchNorm1d(3).double()
    leaf = x.clone().requires_grad_()
    expected = theirs(leaf)
    expected.pow(3).sum().backward()
    results = three.run(on_ranks.empty_group_of_sync_batch_norm, x)
    torch.testing.assert_close(results[0][0], expected.detach())
    torch.testing.assert_close(results[0][1], leaf.grad)
    for y, grad, mean, var in results:
        assert y.shape == grad.shape
        torch.testing.assert_close(mean, theirs.running_mean)
        torch.testing.assert_close(var, theirs.running_var)


# --- DTensor ---------------------------------------------------------------------------------------------------------

DTENSORS = {  # the case, the mesh, and the placements
    "batch": (("n c t -> c", (5, 3, 2), {"affine": ("c", (3,))}), [2], ["S(0)"]),
    "kept": (("n c t -> c", (5, 4, 2), {"affine": ("c", (4,))}), [2], ["S(1)"]),
    "whole": (("n c t -> c", (5, 3, 2), {"affine": ("c", (3,))}), [2], ["R"]),
    "time of masked sequences": (
        ("b (g c) t, b t -> b g", (2, 4, 7), {"mask": ("bool", (2, 7)), "affine": ("(g c)", (4,)), "g": 2}),
        [3], ["S(2)"],
    ),
    "weights": (("b c t, b t -> b", (2, 3, 6), {"mask": ("float", (2, 6))}), [2], ["S(2)"]),
    "nodes of graphs": (
        ("v c -> graph[v] c", (8, 3), {"labels": [("graph", (8,), 3)], "affine": ("c", (3,))}), [3], ["S(0)"],
    ),
    "spatial axes": (("n c ... -> c", (3, 2, 4, 5), {"affine": ("c", (2,))}), [2], ["S(3)"]),
    "a mesh of two dimensions": (("n c h w -> n c", (2, 3, 4, 3), {}), [1, 2], ["S(0)", "S(2)"]),
    "two cuts": (("n c h w -> c", (4, 3, 4, 2), {"affine": ("c", (3,))}), [2, 1], ["S(0)", "S(2)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DTENSORS)
def test_dtensors_say_themselves_what_is_sharded(name, request):
    (pattern, shape, options), mesh, placements = DTENSORS[name]
    processes = request.getfixturevalue({2: "two", 3: "three"}[math.prod(mesh)])
    made = case(pattern, shape, None, {"x": None}, None, dtype=torch.float64, **options)
    sizes = {k: v for k, v in made["options"].items() if k == "g"}
    made |= {"mesh": mesh, "placements": placements, "sizes_of": sizes}
    tensors = {n: t.clone().requires_grad_(t.is_floating_point() and n != "dy") for n, t in made["tensors"].items()}
    leaves = {n: t for n, t in tensors.items() if t.requires_grad}
    x, dy = tensors.pop("x"), tensors.pop("dy")
    labels = {n: Partition(tensors.pop(n), count) for n, count in made["labels"].items()}
    rest = {k: v for k, v in made["options"].items() if k != "g"}
    expected = oracle.normalize(x, pattern, labels=labels, sizes=sizes, **tensors, **rest)
    gradients = dict(zip(leaves, torch.autograd.grad(expected, list(leaves.values()), dy), strict=True))
    m = oracle.moments(x.detach(), pattern, made["tensors"].get("mask"), labels=labels, sizes=sizes)
    for y, ours, own in processes.run(on_ranks.of_dtensor, made):
        torch.testing.assert_close(y, expected.detach(), rtol=1e-9, atol=1e-9)
        for leaf, gradient in gradients.items():
            torch.testing.assert_close(ours[leaf], gradient, rtol=1e-9, atol=1e-9)
        for a, b in zip(own, m, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-9, atol=1e-9)


def test_a_layer_with_running_statistics_takes_dtensors(two):
    x = torch.randn(4, 6, 3)
    norm = Norm("n c t -> c", c=6, affine="c", track_running_stats=True)
    y = norm(x)
    y.square().sum().backward()
    expected = [y.detach(), norm.eval()(x).detach(), norm.running_mean, norm.running_var, norm.weight.grad]
    for results in two.run(on_ranks.dtensor_layer, x):
        for ours in results:
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=5e-6)


def test_a_composition_that_is_cut_is_refused(two):
    for name, text in two.run(on_ranks.cut_composition, torch.randn(4, 8)):
        assert name == "SpecError"
        assert "not along compositions" in text
        assert "Shard(1)" in text


@pytest.mark.parametrize("kind", ["moments", "given", "returned", "cumulative", "step"])
def test_gradients_through_moments_of_dtensors(kind, two):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for found, expected in two.run(on_ranks.through_moments_of_dtensors, x, kind):
        for ours in found:
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_gradients_through_moments_of_complex_dtensors(two):
    x = torch.randn(4, 3, 5, dtype=torch.complex128)
    for found, expected in two.run(on_ranks.through_moments_of_dtensors, x, "given"):
        for ours in found:
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_parameters_and_buffers_that_are_dtensors(two):
    x = torch.randn(6, 3)
    norm = Norm("n c -> c", affine="c", c=3, track_running_stats=True)
    y = norm(x)
    y.square().sum().backward()
    expected = [y.detach(), norm.eval()(x).detach(), norm.running_mean, norm.running_var, norm.weight.grad]
    for results in two.run(on_ranks.buffers_that_are_dtensors, x):
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=5e-6)


# --- models that exist -----------------------------------------------------------------------------------------------


@pytest.mark.extras
def test_a_converted_graph_norm(two):
    from flexnorm.graphs import BatchNorm

    x = torch.randn(6, 3)
    norm = BatchNorm(3)
    expected = norm(x)
    results = two.run(on_ranks.converted_graph_norm, x)
    torch.testing.assert_close(torch.cat([y for y, _, _ in results]), expected.detach(), rtol=2e-6, atol=2e-6)
    for _, mean, var in results:
        torch.testing.assert_close(mean, norm.module.running_mean)
        torch.testing.assert_close(var, norm.module.running_var)
    alone = convert_sync_batchnorm(BatchNorm(3))  # here no group is initialized
    torch.testing.assert_close(alone(x), expected)


def test_conversion_keeps_what_a_model_has():
    shared = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(3, 4), shared, nn.Sequential(nn.ReLU(), shared), nn.InstanceNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    shared.register_forward_hook(lambda *_: seen.append(1))
    expected = copy.deepcopy(model)
    kept = dict(model.named_parameters())
    assert convert_sync_batchnorm(model) is model
    assert type(model[1]) is SyncBatchNorm
    assert model[2][1] is model[1]
    assert type(model[3]) is nn.InstanceNorm1d
    assert all(p is kept[name] for name, p in model.named_parameters())
    x = torch.randn(6, 3)
    for m in (model[:3], expected[:3]):
        m(x).square().sum().backward()
    optimizer.step()
    assert len(seen) == 4
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b - 0.1 * b.grad if b.grad is not None else b)
    expected.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model[1](torch.randn(1, 4))


def test_conversion_refuses_what_it_would_lose():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    for layer, rule in ((WithActivation(3), "a forward of its own"), (nn.LazyBatchNorm2d(), "lazy")):
        model = nn.Sequential(nn.BatchNorm2d(3), layer)
        with pytest.raises(SpecError, match=rule):
            convert_sync_batchnorm(model)
        assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("make", ["layer", "converted"])
def test_synchronized_layers_without_running_statistics_ask_the_ranks(make, monkeypatch):
    asked, ranks = [], Sharding.ranks
    monkeypatch.setattr(Sharding, "ranks", lambda self, *training: asked.append(1) or ranks(self, *training))
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    norm = SyncBatchNorm(4, track_running_stats=False) if make == "layer" else convert_sync_batchnorm(model)[0]
    norm(torch.randn(2, 4, 3, 3))
    assert asked
