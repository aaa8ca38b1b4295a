"""Any pattern over any tensor: random axes, splits, labels, masks, layouts, dtypes and options, against the oracle.

A failure prints a snippet that runs.
"""

import math

import oracle
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from flexnorm import Partition, moments, normalize

AXES = "abcde"
# Six times as many as the profile says: 600, or fewer where CI repeats itself.
EXAMPLES = settings(
    max_examples=6 * settings().max_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def problems(draw):
    """A pattern with everything it names: (pattern, x, keyword arguments)."""
    count = draw(st.integers(1, 4))
    names = list(AXES[:count])
    sizes = {
        name: draw(st.sampled_from([0, 1, 1, 2, 3, 4]) if draw(st.integers(0, 9)) == 0 else st.integers(1, 4))
        for name in names
    }
    while math.prod(sizes.values()) > 200:
        sizes[max(sizes, key=sizes.get)] -= 1
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    left, shape, place = [], [], 0
    while place < count:
        width = draw(st.sampled_from([1, 1, 1, 2]))
        group = names[place : place + width]
        left.append(group[0] if len(group) == 1 else f"({' '.join(group)})")
        shape.append(math.prod(sizes[n] for n in group))
        place += width
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(left)))
        left.insert(at, "1")
        shape.insert(at, 1)

    labels = {}

    def label():
        axes = draw(st.permutations(names))[: draw(st.integers(1, min(2, count)))]
        name = f"label{len(labels)}"
        k = draw(st.integers(1, 4))
        labels[name] = Partition(torch.randint(0, k, [sizes[a] for a in axes], generator=g), k)
        return f"{name}[{' '.join(axes)}]"

    right = list(draw(st.permutations(names))[: draw(st.integers(0, count))])
    right += [label() for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2])))]
    right = list(draw(st.permutations(right)))
    if len(right) > 1 and draw(st.booleans()):
        right[:2] = [f"({right[0]} {right[1]})"]

    kwargs = {"sizes": dict(sizes), "labels": labels}
    mask_axes = list(draw(st.permutations(names))[: draw(st.integers(1, count))])
    kind = draw(st.sampled_from([None, None, "bool", "float"]))
    if kind:
        mask = torch.rand([sizes[a] for a in mask_axes], generator=g, dtype=torch.float64)
        kwargs["mask"] = mask < 0.6 if kind == "bool" else (mask * 3).where(mask > 0.2, 0.0)
    if draw(st.booleans()):
        affine = list(draw(st.permutations(names))[: draw(st.integers(0, count))])
        affine += [label()] if draw(st.integers(0, 3)) == 0 else []
        dims = [labels[a.split("[")[0]].count if "[" in a else sizes[a] for a in affine]
        if len(affine) > 1 and draw(st.booleans()):
            affine[:2], dims[:2] = [f"({affine[0]} {affine[1]})"], [dims[0] * dims[1]]
        kwargs["affine"] = " ".join(affine)
        for name in draw(st.sampled_from([["weight"], ["bias"], ["weight", "bias"]])):
            kwargs[name] = torch.randn(dims, generator=g, dtype=torch.float64)
    options = [
        {},
        {},
        {},
        {"center": False},
        {"scale": False},
        {"eps": 1e-2},
        {"activation": "silu"},
        {"activation": "gelu"},
    ]
    kwargs.update(draw(st.sampled_from(options)))

    x = torch.randn(shape, generator=g, dtype=torch.float64) * draw(st.sampled_from([1.0, 1e-3, 1e3]))
    x = x + draw(st.sampled_from([0.0, 0.0, 1.0, 1e3]))
    order = draw(st.permutations(range(len(shape))))
    x = x.permute(order).contiguous().permute(sorted(range(len(order)), key=order.__getitem__))
    if draw(st.integers(0, 3)) == 0:
        x = torch.stack([x, -x], -1)[..., 0]
    return f"{' '.join(left)}{', ' + ' '.join(mask_axes) if kind else ''} -> {' '.join(right)}", x, kwargs


def snippet(pattern, x, kwargs):
    return (
        f"normalize(torch.tensor({x.tolist()}, dtype=torch.float64), {pattern!r}, **{kwargs!r})  # strides {x.stride()}"
    )


@EXAMPLES
@given(problems())
def test_values_and_gradients(problem):
    pattern, x, kwargs = problem
    note(snippet(*problem))
    scale = max(1.0, x.abs().max().item()) if x.numel() else 1.0
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    leaves = [x]
    for name in ("mask", "weight", "bias"):
        if name in kwargs and kwargs[name].is_floating_point():
            kwargs[name].requires_grad_()
            leaves.append(kwargs[name])
    y, expected = normalize(x, pattern, **kwargs), oracle.normalize(x, pattern, **kwargs)
    # float64 against float64: rounding of the values, over the smallest sigma there can be, sqrt(eps).
    tolerance = 1e-13 * scale / 1e-5**0.5 * scale
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=tolerance)
    assert y.shape == x.shape
    dy = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)
    ours = torch.autograd.grad(y, leaves, dy)
    if not expected.requires_grad:
        assert all((grad == 0).all() for grad in ours)
        return
    theirs = torch.autograd.grad(expected, leaves, dy, allow_unused=True, materialize_grads=True)
    weights = kwargs.get("mask") if "mask" in kwargs and kwargs["mask"].is_floating_point() else None
    for leaf, a, b in zip(leaves, ours, theirs, strict=True):
        if leaf is weights and (weights == 0).any():
            a, b = a[weights > 0], b[weights > 0]  # at 0 a set's total may be 0, where the formula has no derivative
        size = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=1e-7, atol=tolerance * 1e3 * size)


@EXAMPLES
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_precision_of_narrow_types(problem, dtype):
    """Design 4.4 for the input as it was rounded."""
    pattern, x, kwargs = problem
    note(snippet(*problem))
    for name in ("weight", "bias", "affine", "activation", "scale", "center"):
        kwargs.pop(name, None)
    used = pattern.split("->")[1]
    kwargs["labels"] = {name: p for name, p in kwargs["labels"].items() if f"{name}[" in used}
    x = x.to(dtype)
    y, expected = normalize(x, pattern, **kwargs), oracle.normalize(x, pattern, **kwargs)
    eps = kwargs.pop("eps", 1e-5)
    count, mean, m2 = oracle.moments(x, pattern, **kwargs)
    ratio = mean.abs() / (m2 / count.clamp(min=1e-300) + eps).sqrt()
    p = oracle.Pattern(pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    ratios = torch.tensor([ratio[p.place(p.right, e)] for e in p.elements], dtype=torch.float64).reshape(x.shape)
    limit = 4 * torch.finfo(torch.float32).eps * (ratios + expected.abs()) + 1e-6
    limit = limit + (torch.finfo(dtype).eps * expected.abs() if dtype != torch.float32 else 0)
    assert ((y.double() - expected).abs() <= limit).all()


@EXAMPLES
@given(problems())
def test_moments(problem):
    pattern, x, kwargs = problem
    note(snippet(*problem))
    used = pattern.split("->")[1]
    kwargs = {name: kwargs[name] for name in ("mask", "sizes", "labels") if name in kwargs}
    kwargs["labels"] = {name: p for name, p in kwargs["labels"].items() if f"{name}[" in used}
    m = moments(x, pattern, **kwargs)
    for ours, theirs in zip((m.count.double(), m.mean, m.m2), oracle.moments(x, pattern, **kwargs), strict=True):
        size = max(1.0, x.abs().max().item()) if x.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12 * size)


@EXAMPLES
@given(problems(), st.sampled_from([float("nan"), float("inf")]))
def test_what_is_outside_changes_no_bit(problem, fill):
    pattern, x, kwargs = problem
    if "mask" not in kwargs or kwargs["mask"].dtype != torch.bool:
        return
    note(snippet(*problem))
    p = oracle.Pattern(pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    inside = torch.tensor([bool(kwargs["mask"][p.mask_place(e)]) for e in p.elements], dtype=torch.bool).reshape(
        x.shape
    )
    results = []
    for value in (0.0, fill):
        leaf = x.where(inside, value).requires_grad_()
        y = normalize(leaf, pattern, **kwargs)
        results.append((y, *torch.autograd.grad(y, leaf, torch.ones_like(x).where(inside, value))))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
        assert (dirty[~inside] == 0).all()


@EXAMPLES
@given(problems())
def test_gains_and_offsets_of_whole_sets_leave_nothing(problem):
    """With eps=0 a set's own gain (above 0) and offset cancel, weight and bias aside."""
    pattern, x, kwargs = problem
    note(snippet(*problem))
    kwargs = {name: kwargs[name] for name in ("mask", "sizes", "labels") if name in kwargs}
    kwargs["labels"] = {name: p for name, p in kwargs["labels"].items() if f"{name}[" in pattern.split("->")[1]}
    p = oracle.Pattern(pattern, x.shape, kwargs["sizes"], kwargs["labels"])
    shape = p.shape(p.right)
    gain, offset = torch.rand(shape, dtype=torch.float64) + 0.5, torch.randn(shape, dtype=torch.float64)
    places = [p.place(p.right, element) for element in p.elements]
    gains, offsets = (
        torch.tensor([t[q] for q in places], dtype=torch.float64).reshape(x.shape) for t in (gain, offset)
    )
    y, z = normalize(x, pattern, eps=0, **kwargs), normalize(x * gains + offsets, pattern, eps=0, **kwargs)
    # Rounding of x * gain + offset, over the deviation of its set. Where rounding is all there is, nothing is promised.
    count, mean, m2 = oracle.moments(x, pattern, **kwargs)
    sigma = (m2 / count.clamp(min=1e-300)).sqrt()
    sigmas = torch.tensor([float(sigma[q]) for q in places], dtype=torch.float64).reshape(x.shape)
    limit = 64 * 2.3e-16 * (1 + x.abs().max() if x.numel() else 1) / sigmas * (1 + y.abs())
    assert ((y - z).abs() <= limit).logical_or(sigmas <= 1e-9 * (1 + mean.abs().max() if mean.numel() else 1)).all()
