"""Statistics over ranks: real gloo processes against the loops of one, values, all gradients, errors."""

import on_ranks
import oracle
import pytest
import torch
from torch import nn

from flexnorm import Norm, ShapeError, SpecError, calibrate, moments, normalize


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
        "n (g c) h w -> n g", (2, 4, 5, 3), "h", {"x": 2}, {"affine": ("(g c)", (4,)), "g": 2}, {2: [2, 3], 3: [1, 0, 4]},
    ),
    "masked sequences over time": (
        "b (g c) t, b t -> b g", (3, 4, 7), "t", {"x": 2, "mask": 1},
        {"mask": ("bool", (3, 7)), "affine": ("(g c)", (4,)), "g": 2}, {2: [6, 1], 3: [3, 0, 4]},
    ),
    "weighted sequences over time": (
        "b c t, b t -> b c", (2, 3, 6), "t", {"x": 2, "mask": 1}, {"mask": ("float", (2, 6))}, {2: [1, 5], 3: [2, 2, 2]},
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
        "n c t -> c", (4, 2, 3), "n", {"x": 0}, {"affine": ("c", (2,)), "activation": "silu"}, {2: [1, 3], 3: [2, 1, 1]},
    ),
    "far from zero": ("n c t -> c", (4, 2, 30), "n", {"x": 0}, {"offset": 1e3}, {2: [1, 3], 3: [2, 1, 1]}),
    "apart along the ranks": ("n c t -> n c", (4, 2, 3), "n", {"x": 0}, {}, {2: [1, 3], 3: [2, 1, 1]}),
}  # fmt: skip


def joined(results, name, cut, sizes):
    """The parts of all ranks in one: along the cut, or summed where every rank has a gradient of the whole."""
    return torch.cat(results, cut) if cut is not None else sum(results)


def check(processes, made, tolerance):
    world = len(processes.processes)
    del world
    results = processes.run(on_ranks.sharded_normalize, made)
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in made["tensors"].items()}
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if t.is_floating_point() and n != "dy"}
    x, dy = tensors.pop("x"), tensors.pop("dy")
    ids = {name: tensors.pop(name) for name in made["labels"]}
    counts = made["labels"]
    from flexnorm import Partition

    labels = {name: Partition(value, counts[name]) for name, value in ids.items()}
    options = dict(made["options"])
    sizes = {name: options.pop(name) for name in ("g",) if name in options}
    expected = oracle.normalize(x, made["pattern"], labels=labels, sizes=sizes, **tensors, **options)
    gradients = dict(zip(leaves, torch.autograd.grad(expected, list(leaves.values()), dy), strict=True))
    y = torch.cat([y for y, _ in results], made["cut"]["x"])
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        ours = joined([g[name] for _, g in results], name, made["cut"].get(name), made["sizes"])
        torch.testing.assert_close(
            ours.double(), gradient, rtol=tolerance, atol=tolerance * max(1, gradient.abs().max())
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [2, 3])
def test_equals_one_process(name, world, request):
    processes = request.getfixturevalue({2: "two", 3: "three"}[world])
    pattern, shape, sharded, cut, options, sizes = CASES[name]
    # In float64 all roundings are far below 1e-9, even of sets that are nearly equal: which formula it is.
    check(processes, case(pattern, shape, sharded, cut, sizes[world], dtype=torch.float64, **options), 1e-9)
    if name != "weighted sequences over time":
        # In float32: 1e-6 for y of order 1, times what the offset costs any formula: 2^-24 * |mean| / sigma.
        offset = options.get("offset", 3.0)
        check(processes, case(pattern, shape, sharded, cut, sizes[world], **options), 2e-6 * max(1, offset / 10))
