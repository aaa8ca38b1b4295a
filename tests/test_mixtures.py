"""Mixtures against loops over their elements in float64, and against what they become when one pattern counts alone."""

import copy
import pickle
import threading

import on_ranks
import oracle
import pytest
import torch
from torch import nn

import flexnorm
from flexnorm import Norm, Partition, ShapeError, SpecError
from flexnorm.mixtures import Alternatives, ContextGate, ContextNorm, DualNorm, LearnedGate, Mixture, SwitchableNorm

GRAPH = torch.tensor([1, 0, 0, 2, 1, 0, 2])
SENSOR = torch.tensor([0, 1, 0, 1, 1, 0])
REGION = torch.tensor([[0, 1, 1, 0], [2, 2, 0, 1]])
MEMBERS = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
WEIGHTS = torch.tensor([[1.0, 0.5, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0], [0.1, 1.0, 3.0, 1.0, 0.3]])

# patterns, shape of x, mask, options of the layer, labels
CASES = {
    "switchable": (["n c h w -> n c", "n c h w -> n", "n c h w -> c"], (3, 4, 2, 3), None, {}, {}),
    "dots": (["n c ... -> n c", "n c ... -> "], (3, 4, 2, 3), None, {}, {}),
    "groups": (["n (g c) t -> n g c", "n (g c) t -> n g", "n (g c) t -> g c"], (3, 6, 5), None, {"g": 2}, {}),
    "one pattern": (["n c t -> n"], (3, 4, 5), None, {}, {}),
    "no common finest": (["n c t -> n t", "n c t -> c"], (3, 4, 5), None, {}, {}),
    "masked": (["b t c, b t -> b c", "b t c, b t -> b t", "b t c, b t -> c"], (3, 5, 4), MEMBERS, {}, {}),
    "weighted": (["b t c, b t -> b c", "b t c, b t -> b", "b t c, b t -> "], (3, 5, 4), WEIGHTS, {}, {}),
    "graphs": (["v c -> graph[v] c", "v c -> graph[v]", "v c -> c"], (7, 3), None, {}, {"graph": GRAPH}),
    "graphs and nodes": (["v c -> graph[v] c", "v c -> v"], (7, 3), None, {}, {"graph": GRAPH}),
    "a label of kept axes": (["n c t -> n c", "n c t -> n sensor[c]"], (2, 6, 5), None, {}, {"sensor": SENSOR}),
    "regions": (["n h w -> n region[h w]", "n h w -> region[h w]"], (3, 2, 4), None, {}, {"region": REGION}),
    "two labels": (
        ["v c -> graph[v] sensor[c]", "v c -> graph[v]", "v c -> sensor[c]"],
        (7, 6),
        None,
        {},
        {"graph": GRAPH, "sensor": SENSOR},
    ),
}


def alternatives(x, patterns, mask, sizes, labels):
    """For every element: count, mean and variance of its set in each pattern, (numel, K), differentiable."""
    columns = []
    for pattern in patterns:
        p = oracle.Pattern(pattern, x.shape, sizes, labels)
        count, mean, m2 = oracle.moments(x, pattern, mask, sizes=sizes, labels=labels)
        places = [p.place(p.right, element) for element in p.elements]
        var = m2 / count.where(count > 0, 1)
        columns.append(torch.stack([torch.stack([t[place] for place in places]) for t in (count, mean, var)]))
    return torch.stack(columns, -1)


def mixture(x, patterns, of_means, of_vars, mask, sizes, labels, mix, eps=1e-5):
    """y in float64, differentiable in x and the logits, (numel, K) or (K,)."""
    count, mean, var = alternatives(x, patterns, mask, sizes, labels)
    known = count > (0 if mask is not None and mask.is_floating_point() else 1)
    known = known | (~known.any(-1, keepdim=True) & (count > 0))
    w, v = (
        logits.double().expand(count.shape).masked_fill(~known, -1e30).softmax(-1) for logits in (of_means, of_vars)
    )
    flat = x.double().flatten()
    if mix == "moments":
        y = (flat - (w * mean).sum(-1)) / ((v * var).sum(-1) + eps).sqrt()
    else:
        y = (w * (flat[:, None] - mean) / (var + eps).sqrt()).sum(-1)
    inside = known.any(-1)
    if mask is not None and mask.dtype == torch.bool:
        p = oracle.Pattern(patterns[0], x.shape, sizes, labels)
        inside = inside & torch.stack([mask[p.mask_place(element)] for element in p.elements])
    return y.where(inside, 0).reshape(x.shape)


def made(case, mix, **options):
    patterns, shape, mask, sizes, labels = CASES[case]
    torch.manual_seed(0)
    norm = Mixture(patterns, mix=mix, **sizes, **options)
    with torch.no_grad():
        for weight in norm.gate.parameters():
            weight.copy_(torch.randn_like(weight))
    return norm, patterns, shape, mask, sizes, labels


@pytest.mark.parametrize("mix", ["moments", "results"])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.01, 3.0), (50.0, -1000.0)])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_loops(case, scale, offset, mix):
    """In float64: sums of up to 60 terms, which eps magnifies 1e3 times at most; 1e-9 leaves a factor of 1e3."""
    norm, patterns, shape, mask, sizes, labels = made(case, mix, dtype=torch.float64)
    x = (offset + scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weights = [norm.gate.mean_weight, norm.gate.mean_weight if mix == "results" else norm.gate.var_weight]
    y = norm(x, mask, **labels)
    expected = mixture(x, patterns, *weights, mask, sizes, labels, mix)
    size = 1 + expected.abs().max() + abs(offset) / scale
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9 * float(size.detach()))
    dy = torch.randn(shape, dtype=torch.float64)
    used = [x, *norm.gate.parameters()]
    for got, want in zip(torch.autograd.grad(y, used, dy), torch.autograd.grad(expected, used, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7 * float(want.abs().max() + 1e-12))


@pytest.mark.parametrize("mix", ["moments", "results"])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.1, 1000.0), (1e3, 1e-3)])
@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_exact_as_one_norm(case, scale, offset, mix):
    """Design 4.4: 4 eps (|mean| / sigma + |y|) + 1e-6, of the smallest sigma, as any of the patterns may be the one."""
    norm, patterns, shape, mask, sizes, labels = made(case, mix)
    x = offset + scale * torch.randn(shape)
    weights = [norm.gate.mean_weight, norm.gate.mean_weight if mix == "results" else norm.gate.var_weight]
    expected = mixture(x, patterns, *weights, mask, sizes, labels, mix).detach()
    count, mean, var = alternatives(x, patterns, mask, sizes, labels)
    known = count > 1
    sigma = (var.where(known, torch.inf).amin(-1) + 1e-5).sqrt().reshape(shape)
    ratio = (mean.abs().amax(-1).reshape(shape) / sigma).clamp(max=1e12)
    # Where a mean of sets that differ comes in, their distance counts as deviations do.
    spread = (x.double() - mean.mean()).abs().amax() / sigma
    bound = 4 * torch.finfo(torch.float32).eps * (ratio + expected.abs() + spread) + 1e-6
    error = (norm(x, mask, **labels).double() - expected).abs()
    assert (error <= bound).all(), (error / bound).max()


def test_moments_mixed_are_those_of_the_formula():
    torch.manual_seed(0)
    x = torch.randn(5, 7, dtype=torch.float64) + 10
    m = flexnorm.moments(x, "n c -> n c")
    m = flexnorm.Moments(torch.full((5, 7), 4.0), m.mean, torch.rand(5, 7, dtype=torch.float64))
    w, v = torch.rand(2, 5, 7, dtype=torch.float64)
    mixed = m.mixed(w, v)
    torch.testing.assert_close(mixed.mean, (w * x).sum(-1) / w.sum(-1))
    torch.testing.assert_close(mixed.var, (v * m.m2 / 4).sum(-1) / v.sum(-1))
    z = torch.randn(5, 1, dtype=torch.float64)
    of_results = m.mixed_results(w, 0.1)
    expected = (w * (z - x) / (m.m2 / 4 + 0.1).sqrt()).sum(-1) / w.sum(-1)
    torch.testing.assert_close((z[:, 0] - of_results.mean) / (of_results.var + 0.1).sqrt(), expected)


def test_empty_alternatives_have_no_say():
    m = flexnorm.Moments(torch.tensor([0, 3]), torch.tensor([torch.nan, 2.0]), torch.tensor([torch.nan, 6.0]))
    for mixed in (m.mixed(torch.tensor([0.9, 0.1])), m.mixed_results(torch.tensor([0.9, 0.1]), 0.0)):
        assert mixed.mean == 2.0
        torch.testing.assert_close(mixed.var, torch.tensor(2.0))
    empty = flexnorm.Moments(torch.tensor([0, 0]), torch.zeros(2), torch.zeros(2)).mixed(torch.tensor([0.5, 0.5]))
    assert empty.count == 0
    assert empty.mean == 0


def test_results_of_alternatives_without_variance_and_eps_are_zero():
    """eps = 0 and var = 0 give 0, so with half of the weight the result is half of the other's; alone, 0."""
    x = torch.tensor([5.0, 7.0, 9.0])
    m = flexnorm.Moments(torch.tensor([3, 3]), torch.tensor([5.0, 7.0]), torch.tensor([0.0, 6.0]))
    mixed = m.mixed_results(torch.tensor([0.5, 0.5]), 0.0)
    y = flexnorm.normalize(x, "n ->", moments=mixed, eps=0)
    torch.testing.assert_close(y, (x - 7) / 2**0.5 / 2)
    alone = flexnorm.Moments(torch.tensor([3, 3]), torch.tensor([5.0, 7.0]), torch.zeros(2))
    assert (flexnorm.normalize(x, "n ->", moments=alone.mixed_results(torch.ones(2), 0.0), eps=0) == 0).all()


@pytest.mark.parametrize("labels", [{}, {"kind": Partition(torch.tensor([2, 0, 0, 2]), count=4)}])
def test_refined_is_what_coarsened_of_every_set(labels):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5) + 100
    fine = flexnorm.moments(x, "n c t -> n c")
    pattern = "n c -> n kind[c]" if labels else "n c -> c"
    back = fine.coarsen(pattern, **labels).refine(pattern, fine.mean.shape, **labels)
    for n in range(3):
        for c in range(4):
            inside = (
                x[n, [i for i in range(4) if labels["kind"].ids[i] == labels["kind"].ids[c]]] if labels else x[:, c]
            )
            assert back.count[n, c] == inside.numel()
            torch.testing.assert_close(back.mean[n, c].double(), inside.double().mean(), rtol=1e-6, atol=0)
            torch.testing.assert_close(back.var[n, c].double(), inside.double().var(unbiased=False), rtol=1e-5, atol=0)


def test_what_is_refined_fits_its_pattern():
    m = flexnorm.moments(torch.randn(3, 4, 5), "n c t -> n c")
    with pytest.raises(ShapeError, match="refined from the sets"):
        m.refine("n c -> n", (3, 4))


def certain(gate, index):
    """A gate of one pattern alone: the others have exp(-200) of its weight, nothing in float32."""
    with torch.no_grad():
        for weight in gate.parameters():
            weight.copy_(200.0 * (torch.arange(weight.shape[-1]) == index))


PEERS = {
    0: lambda x: nn.functional.instance_norm(x),
    1: lambda x: nn.functional.layer_norm(x, x.shape[1:]),
    2: lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "group": lambda x: nn.functional.group_norm(x, 2),
}


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_switchable_norm_certain_of_one_is_that_of_torch(index, memory):
    torch.manual_seed(0)
    x = (3 * torch.randn(4, 6, 5, 7) + 2).to(memory_format=memory)
    norm = SwitchableNorm(6)
    certain(norm.gate, index)
    torch.testing.assert_close(norm(x), PEERS[index](x), rtol=1e-5, atol=1e-5)
    assert norm(x).is_contiguous(memory_format=memory)


def switchable(x, mean_weight, var_weight, running=None, eps=1e-5):
    """As the paper writes it, in float64 (and as its authors' code does, but for biased variances)."""
    x = x.double()
    means = [x.mean((2, 3), keepdim=True), x.mean((1, 2, 3), keepdim=True), x.mean((0, 2, 3), keepdim=True)]
    variances = [
        x.var((2, 3), unbiased=False, keepdim=True),
        x.var((1, 2, 3), unbiased=False, keepdim=True),
        x.var((0, 2, 3), unbiased=False, keepdim=True),
    ]
    if running is not None:
        means[2], variances[2] = (t.double().view(1, -1, 1, 1) for t in running)
    w, v = mean_weight.double().softmax(0), var_weight.double().softmax(0)
    mean, var = (sum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((w, means), (v, variances)))
    return (x - mean) / (var + eps).sqrt()


def test_switchable_norm_is_that_of_the_paper_in_training_and_evaluation():
    torch.manual_seed(0)
    norm = SwitchableNorm(6, dtype=torch.float64)
    batch_norm = nn.BatchNorm2d(6, dtype=torch.float64)
    with torch.no_grad():
        for p in norm.gate.parameters():
            p.copy_(torch.randn(3))
    for _ in range(3):
        x = 3 * torch.randn(4, 6, 5, 7, dtype=torch.float64) + 2
        expected = switchable(x, norm.gate.mean_weight, norm.gate.var_weight)
        torch.testing.assert_close(norm(x), expected, rtol=1e-9, atol=1e-9)
        batch_norm(x)
    runs = norm.running["2"]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(runs, name), getattr(batch_norm, name))
    norm.eval()
    running = (runs.running_mean, runs.running_var)
    expected = switchable(x, norm.gate.mean_weight, norm.gate.var_weight, running)
    torch.testing.assert_close(norm(x), expected, rtol=1e-9, atol=1e-9)


def test_in_evaluation_a_sample_is_normalized_alone():
    torch.manual_seed(0)
    norm = SwitchableNorm(4)
    x = torch.randn(6, 4, 5, 5)
    norm(x)
    norm.eval()
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]), rtol=0, atol=1e-6)  # a few roundings of |y| < 4


def test_evaluation_before_any_batch_is_an_error():
    with pytest.raises(SpecError, match="have seen no batch"):
        SwitchableNorm(4).eval()(torch.randn(2, 4, 3, 3))


def test_return_moments_changes_nothing():
    norm = SwitchableNorm(4)
    x = torch.randn(2, 4, 3, 3)
    y, used = norm(x, return_moments=True)
    assert not norm.running["2"].num_batches_tracked
    assert used.mean.shape == (2, 4)
    torch.testing.assert_close(y, norm(x))
    assert norm.running["2"].num_batches_tracked == 1


def test_calibrated_as_other_layers_with_running_statistics():
    torch.manual_seed(0)
    x = torch.randn(30, 4, 3, 3) + 5
    norm = flexnorm.calibrate(SwitchableNorm(4), x.split(7))
    torch.testing.assert_close(norm.running["2"].running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running["2"].running_var, x.var((0, 2, 3)))


def test_dual_norm_begins_as_the_average_of_both():
    torch.manual_seed(0)
    x = 3 * torch.randn(4, 8, 5, 5) + 2
    both = nn.functional.group_norm(x, 2), nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(DualNorm(2, 8)(x), sum(both) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8), (1, 8, 1, 1)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_dual_norm_of_one_value_per_channel_is_group_norm(shape, offset):
    """Whatever the gate has learned."""
    torch.manual_seed(0)
    norm = DualNorm(2, 8)
    for p in norm.gate.parameters():
        nn.init.normal_(p)
    x = (torch.randn(shape) + offset).requires_grad_()
    y, expected = norm(x), nn.functional.group_norm(x.double(), 2)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4 * 1.2e-7 * (offset + 4) + 1e-6)
    dy = torch.randn(shape)
    got, want = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy.double())[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert norm.running["1"].running_var.isfinite().all()


def test_dual_norm_learns_what_a_batch_of_which_size_is_worth():
    """Group norm is right for batches of 2, batch norm for those of 64: one bias for both cannot be."""
    torch.manual_seed(0)
    norm = DualNorm(2, 8, affine=False)
    optimizer = torch.optim.Adam(norm.parameters(), lr=0.1)
    right = {2: PEERS["group"], 64: PEERS[2]}

    def error(norm, size):
        x = torch.randn(size, 8, 2, 2)
        return (norm(x) - right[size](x)).square().mean()

    for _ in range(100):
        loss = error(norm, 2) + error(norm, 64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for size in right:
        assert error(norm, size) < error(DualNorm(2, 8, affine=False), size) / 4


def test_what_a_gate_sees():
    """Noise of a variance by simulation; distances and ratios by hand; and nothing of gain and offset."""
    seen = []

    class Watching(LearnedGate):
        def forward(self, alternatives):
            seen.append(alternatives)
            return super().forward(alternatives)

    torch.manual_seed(0)
    norm = Mixture(["n c t -> n c", "n c t -> n"], gate=Watching(2), eps=0.0, dtype=torch.float64)
    x = torch.randn(400, 3, 50, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1)
    norm(x)
    norm(1000 * x - 7)
    first, second = (alternatives.features() for alternatives in seen)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        seen[0].noise[0], torch.tensor([(2 / 50) ** 0.5, (2 / 150) ** 0.5]).double().expand(3, 2)
    )
    measured = x.var(-1).std(0) / x.var(-1).mean(0)
    torch.testing.assert_close(measured, seen[0].noise[0, :, 0], rtol=0.15, atol=0)  # 4 / sqrt(2 * 400)
    own, image = x.var(-1, unbiased=False), x.flatten(1).var(-1, unbiased=False)[:, None].expand(-1, 3)
    middle = (own + image) / 2
    torch.testing.assert_close(first[..., 2], torch.stack([(own / middle).log(), (image / middle).log()], -1))
    apart = (x.mean(-1) - x.mean((1, 2))[:, None]) / 2 / middle.sqrt()
    torch.testing.assert_close(first[..., 1], torch.stack([apart, -apart], -1))


@pytest.mark.parametrize("mix", ["moments", "results"])
def test_a_choice_that_depends_on_the_input_against_the_loops(mix):
    """The gate is called by itself on what the loops say, and the result compared: features are part of the graph."""
    torch.manual_seed(0)
    patterns = ["n c t -> n c", "n c t -> n", "n c t -> "]
    gate = ContextGate(3, 5, separate=mix == "moments", dtype=torch.float64)
    for p in gate.parameters():
        nn.init.normal_(p)
    norm = Mixture(patterns, gate=gate, mix=mix, dtype=torch.float64)
    x = (2 * torch.randn(3, 4, 6, dtype=torch.float64) + 3).requires_grad_()
    count, mean, var = alternatives(x, patterns, None, {}, {})
    even = var.mean(-1, keepdim=True) + 1e-5
    distance = (mean - mean.mean(-1, keepdim=True)) / even.sqrt()
    noise = ((2 / count).sqrt() + 1e-3).log()
    features = torch.stack([noise, distance, ((var + 1e-5) / even).log()], -1).flatten(-2)
    logits = gate.out(nn.functional.silu(gate.hidden(features)))
    both = logits.chunk(2, -1) if mix == "moments" else (logits, logits)
    expected = mixture(x, patterns, *both, None, {}, {}, mix)
    y = norm(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(x)
    used = [x, *gate.parameters()]
    for got, want in zip(torch.autograd.grad(y, used, dy), torch.autograd.grad(expected, used, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_context_norm_chooses_by_the_input_and_by_nothing_else_than_its_own_sample():
    torch.manual_seed(0)
    norm = ContextNorm(2, 8)
    for p in norm.gate.parameters():
        nn.init.normal_(p)
    x = torch.randn(5, 8, 4, 4)
    torch.testing.assert_close(norm(x)[2:3], norm(x[2:3]), rtol=0, atol=2e-6)  # a few roundings of |y| < 5
    gains = torch.tensor([1.0, 1.0, 5.0, 5.0, 5.0]).view(5, 1, 1, 1)
    torch.testing.assert_close(norm(gains * x + 3), norm(x), rtol=0, atol=1e-3)  # but for eps, and what offset 3 rounds
    tilted = x * torch.linspace(0.1, 3, 8).view(8, 1, 1)
    parts = [flexnorm.normalize(tilted, p, g=2) for p in ("n (g c) h w -> n g c", "n (g c) h w -> n g")]
    assert (norm(tilted) - parts[0]).abs().max() > 0.1
    assert (norm(tilted) - parts[1]).abs().max() > 0.1


@pytest.mark.parametrize("make", [lambda: SwitchableNorm(8), lambda: DualNorm(2, 8), lambda: ContextNorm(2, 8)])
@pytest.mark.parametrize("filler", [0.0, 1e30, torch.nan, torch.inf])
def test_what_padding_holds_changes_no_bit(make, filler):
    torch.manual_seed(0)
    norm = make()
    mask = torch.rand(3, 5, 4) < 0.6
    mask[1] = False
    x = torch.randn(3, 8, 5, 4)
    inside = mask[:, None].expand_as(x)
    dy = torch.randn_like(x)
    results = []
    for padding in (1.0, filler):
        given = x.where(inside, padding).requires_grad_()
        y = copy.deepcopy(norm)(given, mask)
        y.backward(dy)
        results.append((y, given.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (results[1][0][~inside] == 0).all()
    assert (results[1][1][~inside] == 0).all()


def test_masks_and_labels_from_around():
    patterns = ["v c, v -> graph[v] c", "v c, v -> c"]
    norm = Mixture(patterns)
    x, mask = torch.randn(7, 3), torch.rand(7) < 0.8
    with flexnorm.given(mask=mask, graph=GRAPH):
        y = nn.Sequential(norm)(x)
    assert torch.equal(y, norm(x, mask, graph=GRAPH))
    norm = Mixture(["n c t -> n c", "n c t -> n sensor[c]"])
    with flexnorm.given(sensor=SENSOR):
        y = norm(x := torch.randn(2, 6, 5))
    assert torch.equal(y, norm(x, sensor=SENSOR))


def test_static_labels_are_part_of_the_layer():
    norm = Mixture(["n c t -> n c", "n c t -> n sensor[c]"], sensor=SENSOR)
    assert "sensor_ids" in norm.state_dict()
    x = torch.randn(2, 6, 5)
    assert torch.equal(norm(x), Mixture(["n c t -> n c", "n c t -> n sensor[c]"])(x, sensor=SENSOR))


def test_running_statistics_of_labels():
    norm = Mixture(["v c -> v", "v c -> kind[v] c"], c=3, kind=3, track_running_stats=True)
    x = torch.randn(7, 3)
    norm(x, kind=GRAPH)
    expected = torch.stack([x[k == GRAPH].mean(0) for k in range(3)])
    torch.testing.assert_close(norm.running["1"].running_mean, 0.1 * expected)


@pytest.mark.parametrize("make", [lambda: SwitchableNorm(8), lambda: DualNorm(2, 8), lambda: ContextNorm(2, 8)])
def test_copies_and_states_are_whole(make):
    torch.manual_seed(0)
    norm, x = make(), torch.randn(3, 8, 4, 4)
    norm(x)
    other = make()
    other.load_state_dict(norm.state_dict())
    for same in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), other):
        assert torch.equal(same.eval()(x), norm.eval()(x))


def test_half_precision_is_rounded_once():
    torch.manual_seed(0)
    norm, x = SwitchableNorm(8), (torch.randn(3, 8, 4, 4) + 3).bfloat16()
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), rtol=2**-8, atol=1e-6)  # one unit, at the edges


@pytest.mark.parametrize(
    "make",
    [lambda: SwitchableNorm(8), lambda: DualNorm(2, 8), lambda: ContextNorm(2, 8)],
    ids=["switch", "dual", "context"],
)
@pytest.mark.slow
def test_compiled_into_one_graph(make):
    torch.manual_seed(0)
    norm = make()
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
    for size in (3, 4):
        x = torch.randn(size, 8, 4, 4, requires_grad=True)
        y, expected = compiled(x), norm(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(x)
        got, want = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_with_a_label():
    norm = Mixture(["n c t -> n c", "n c t -> n sensor[c]", "n c t -> n"], sensor=SENSOR)
    x = torch.randn(2, 6, 5)
    torch.testing.assert_close(torch.compile(norm, fullgraph=True, backend="aot_eager")(x), norm(x))


def test_a_gate_of_ones_own():
    """A number for every channel, as Batch-Instance Normalization has it."""

    class PerChannel(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.logits = nn.Parameter(torch.randn(channels, 2))

        def forward(self, seen):
            assert isinstance(seen, Alternatives)
            return self.logits

    torch.manual_seed(0)
    norm = Mixture(["n c ... -> n c", "n c ... -> c"], gate=PerChannel(6), mix="results")
    x = 2 * torch.randn(3, 6, 5, 5) + 1
    share = norm.gate.logits.softmax(-1)[:, 0].view(6, 1, 1)
    expected = share * PEERS[0](x) + (1 - share) * PEERS[2](x)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


class Constant(nn.Module):
    def __init__(self, *logits):
        super().__init__()
        self.logits = logits

    def forward(self, seen):
        return self.logits if len(self.logits) > 1 else self.logits[0]


@pytest.mark.parametrize(
    ("error", "call"),
    [
        ("in a list", lambda: Mixture("n c -> n")),
        ("in a list", lambda: Mixture([])),
        ("one left side", lambda: Mixture(["n c t -> n c", "n (g c) t -> n g"])),
        ("one left side", lambda: Mixture(["n c t, n t -> n c", "n c t -> n"])),
        ("moments or results", lambda: Mixture(["n c -> n"], mix="both")),
        ("is no axis and no label", lambda: Mixture(["n c -> n"], kind=3)),
        ("outlive a batch", lambda: Mixture(["n c -> n"], track_running_stats=True)),
        ("'c'", lambda: Mixture(["n c -> n", "n c -> c"], track_running_stats=True)),
        ("is read, and not given", lambda: Mixture(["v c -> v", "v c -> kind[v]"])(torch.randn(3, 2))),
        (
            "floating logits",
            lambda: Mixture(["n c -> n", "n c -> c"], gate=Constant(torch.ones(3)))(torch.randn(3, 2)),
        ),
        ("floating logits", lambda: Mixture(["n c -> n", "n c -> c"], gate=Constant(1.0))(torch.randn(3, 2))),
        (
            "floating logits",
            lambda: Mixture(["n c -> n", "n c -> c"], gate=Constant(torch.ones(2), torch.ones(2)), mix="results")(
                torch.randn(3, 2)
            ),
        ),
        ("num_groups", lambda: DualNorm(0, 8)),
        ("divi", lambda: DualNorm(3, 8)),
        ("num_features", lambda: SwitchableNorm(0)),
    ],
)
def test_errors_say_what_to_type(error, call):
    with pytest.raises((SpecError, ShapeError), match=error):
        call()


@pytest.mark.parametrize("first", [0, 1])
def test_the_left_side_to_type_is_the_finest(first):
    patterns = ["n c h w -> n c", "n (g c) h w -> n g"]
    with pytest.raises(SpecError, match=r'instead: +"n \(g c\) h w -> \.\.\."'):
        Mixture([patterns[first], patterns[1 - first]], g=2)


def test_a_call_that_fails_updates_nothing():
    norm = Mixture(["n c t, n t -> n c", "n c t, n t -> c"], c=4, affine="c", track_running_stats=True)
    with pytest.raises(ShapeError):
        norm(torch.randn(2, 4, 5), torch.ones(2, 6).bool())
    with pytest.raises(ShapeError):
        norm(torch.randn(2, 3, 5))
    assert not norm.running["1"].num_batches_tracked


def test_a_mixture_is_a_norm():
    norm = SwitchableNorm(8)
    assert isinstance(norm, Norm)
    assert "'n c ..., n ... -> n c', 'n c ..., n ... -> n', 'n c ..., n ... -> c'" in repr(norm)


def test_explained_pattern_by_pattern():
    norm = SwitchableNorm(8)
    report = flexnorm.explain(norm, (2, 8, 5, 5))
    assert [row[3:7] for row in report.rows] == [
        ("16", "25", "nn.InstanceNorm2d(8)", "apart"),
        ("2", "200", "nn.LayerNorm([8, 5, 5])", "apart"),
        ("8", "50", "nn.BatchNorm2d(8)", "running statistics"),
    ]
    assert sum(int(row[-1]) for row in report.rows) == sum(p.numel() for p in norm.parameters())
    report = flexnorm.explain(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.GroupNorm(2, 8)), (2, 3, 7, 7))
    assert [row[0] for row in report.rows] == ["1", "1 (2)", "1 (3)", "2"]
    assert not norm.running["2"].num_batches_tracked
    assert norm.running["2"].running_statistics.unseen is False


SIDES = [
    "", "1", "n", "(n g)", "n g c", "(n g c)", "t n", "kind[c]", "n kind[c]", "(n kind[c]) g",
    "place[g t]", "place[g t] c", "n place[g t] kind[c]", "n (kind[c] t)", "n g c t",
]  # fmt: skip


@pytest.mark.parametrize("second", SIDES)
@pytest.mark.parametrize("first", SIDES)
def test_certain_of_any_pattern_beside_any_other(first, second):
    """Composed, permuted, labelled: sets of both are made of those of the finest, and come back from them."""
    torch.manual_seed(0)
    labels = {"kind": torch.tensor([1, 0, 1]), "place": torch.tensor([[0, 3, 1, 0], [2, 2, 0, 3]])}
    x = torch.randn(2, 6, 4, dtype=torch.float64) + 1
    patterns = [f"n (g c) t -> {side}" for side in (first, second)]
    read = {name: ids for name, ids in labels.items() if any(name in pattern for pattern in patterns)}
    norm = Mixture(patterns, g=2, dtype=torch.float64)
    for index, pattern in enumerate(patterns):
        certain(norm.gate, index)
        told = {name: ids for name, ids in read.items() if name in pattern}
        expected = flexnorm.normalize(x, pattern, g=2, **told)
        several = expected != 0  # sets of one element have no say
        y = norm(x, **read)
        torch.testing.assert_close(y[several], expected[several], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("patterns", "shape"),
    [
        (["... c -> ...", "... c -> c"], (2, 3, 4)),
        (["... c -> (...)", "... c -> "], (2, 3, 4)),
        (["n c ... -> n region[...]", "n c ... -> n c"], (2, 3, 2, 2)),
        (["n 3 t -> n", "n 3 t -> t"], (2, 3, 4)),
        (["n c 1 -> n", "n c 1 -> c"], (2, 3, 1)),
    ],
)
def test_dots_and_numbers(patterns, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    labels = {"region": torch.tensor([[0, 1], [1, 1]])} if "region" in patterns[0] else {}
    norm = Mixture(patterns, dtype=torch.float64)
    expected = mixture(x, patterns, torch.zeros(2), torch.zeros(2), None, {}, labels, "moments")
    torch.testing.assert_close(norm(x, **labels), expected, rtol=1e-9, atol=1e-9)


def choosing(make, seed=0):
    """With a gate that has learned something."""
    torch.manual_seed(seed)
    norm = make()
    for p in norm.gate.parameters():
        nn.init.normal_(p)
    return norm


MADE = {
    "switch": lambda **o: SwitchableNorm(8, **o),
    "dual": lambda **o: DualNorm(2, 8, **o),
    "context": lambda **o: ContextNorm(2, 8, **o),
}


@pytest.mark.parametrize(("std", "mean"), [(0.1, 1e4), (1.0, 1e4), (3.0, 0.0)])
@pytest.mark.parametrize("kind", MADE)
def test_far_from_zero(kind, std, mean):
    """Design 4.4 of y, and gradients at 1e-5 of the largest, those of the gate too; the reference is float64."""
    norm = choosing(MADE[kind])
    wide = copy.deepcopy(norm).double()
    x = (mean + std * torch.randn(4, 8, 5, 5)).requires_grad_()
    z, dy = x.detach().double().requires_grad_(), torch.randn(4, 8, 5, 5)
    y, expected = norm(x), wide(z)
    bound = 4 * 1.2e-7 * (mean / std + expected.abs()) + 1e-6
    assert ((y.double() - expected).abs() <= bound).all()
    got = torch.autograd.grad(y, [x, *norm.gate.parameters()], dy)
    want = torch.autograd.grad(expected, [z, *wide.gate.parameters()], dy.double())
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max() + 1e-7


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("std", [1e-14, 1e-3, 1e14])
def test_gradients_without_eps_at_any_scale(kind, std):
    norm = choosing(lambda: MADE[kind](eps=0.0))
    wide = copy.deepcopy(norm).double()
    x = (std * torch.randn(4, 8, 5, 5)).requires_grad_()
    z, dy = x.detach().double().requires_grad_(), torch.randn(4, 8, 5, 5)
    got, want = torch.autograd.grad(norm(x), x, dy)[0], torch.autograd.grad(wide(z), z, dy.double())[0]
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("mask", [torch.ones(1), torch.ones(1, dtype=torch.bool), None, 3 * torch.ones(1)])
def test_one_vector_is_group_norm_with_any_mask(mask):
    norm, x = choosing(MADE["dual"]), torch.randn(1, 8)
    torch.testing.assert_close(norm(x, mask), nn.functional.group_norm(x, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MADE)
def test_from_meta_and_reset(kind):
    norm = MADE[kind](device="meta").to_empty(device="cpu")
    for t in (*norm.parameters(), *norm.buffers()):
        t.data.fill_(7)
    norm.reset_parameters()
    torch.manual_seed(0)
    fresh = MADE[kind]()
    for (name, a), b in zip(norm.state_dict().items(), fresh.state_dict().values(), strict=True):
        if "hidden" not in name:  # which begins at random
            assert torch.equal(a, b), name
    norm(torch.randn(2, 8, 3, 3))
    norm.reset_running_stats()
    assert all(not run.num_batches_tracked for run in norm._runs())


@pytest.mark.parametrize("option", [{"center": False}, {"scale": False}, {"cumulative": "t"}])
def test_options_of_one_norm_are_none_of_a_mixture(option):
    with pytest.raises(SpecError, match="no option of it"):
        Mixture(["b c t -> b c", "b c t -> b"], **option)
    norm = Mixture(
        ["n scale t -> n scale", "n scale t -> n"], sizes={"scale": 4}, affine="scale"
    )  # an axis may have any name
    assert norm.weight.shape == (4,)


def test_running_means_are_complex_where_x_is():
    x = torch.randn(3, 8, 4, 4, dtype=torch.complex64)
    for mode in (True, False):
        norm = SwitchableNorm(8)
        norm(torch.randn(3, 8, 4, 4))
        with pytest.raises(SpecError, match="running means are complex"):
            norm.train(mode)(x)
    for kind in MADE:
        norm = choosing(lambda kind=kind: MADE[kind](dtype=torch.complex64))
        assert all(not p.is_complex() for p in norm.gate.parameters())
        assert norm(x).isfinite().all()


def test_what_a_gate_sees_does_not_depend_on_the_order_of_patterns():
    seen = []

    class Watching(LearnedGate):
        def forward(self, alternatives):
            seen.append(alternatives.moments.mean)
            return super().forward(alternatives)

    patterns, x = ["n c ... -> c", "n c ... -> n"], torch.randn(4, 8, 3, 3)
    for order in (patterns, patterns[::-1]):
        Mixture(order, gate=Watching(2))(x)
    assert torch.equal(seen[0], seen[1].flip(-1))
    assert seen[0].shape == (4, 8, 2)


def test_training_as_a_function():
    torch.manual_seed(0)
    norm, x = SwitchableNorm(8), torch.randn(2, 5, 8, 3, 3)
    other = copy.deepcopy(norm)
    params = {name: p.detach() for name, p in norm.named_parameters()}

    def loss(params, x):
        y, seen = torch.func.functional_call(norm, params, (x,), {"return_moments": True})
        return y.square().mean(), seen

    for batch in x:
        _, seen = torch.func.grad(loss, has_aux=True)(params, batch)
        moved = norm.updated(seen)
        with torch.no_grad():
            for name, value in moved.items():
                norm.get_buffer(name).copy_(value)
        other(batch)
    for (name, a), b in zip(norm.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    with pytest.raises(SpecError, match="is built so"):
        ContextNorm(2, 8).updated(seen)


def test_momentum_and_tracking_are_those_of_the_running_statistics():
    norm = SwitchableNorm(8, momentum=0.3)
    assert norm.momentum == norm.running["2"].momentum == 0.3
    assert norm.track_running_stats
    assert not ContextNorm(2, 8).track_running_stats
    norm.momentum = None
    assert norm.running["2"].momentum is None
    with pytest.raises(SpecError, match="momentum"):
        SwitchableNorm(8, momentum=2.0, track_running_stats=False)
    norm(torch.randn(2, 8, 3, 3))
    norm.track_running_stats = False
    norm(torch.randn(2, 8, 3, 3))
    assert norm.running["2"].num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_read_in_the_dtype_of_the_moments(dtype):
    """Half precision has no 257: the counts must not be computed in it."""
    x = torch.randn(2, 257) + 1e4
    m = flexnorm.moments(x, "n c -> n")
    ones = torch.ones(2, dtype=dtype)
    weighed = m.weighed(ones)
    assert weighed.count.dtype == weighed.mean.dtype == torch.float32
    assert (weighed.count == 257).all()
    torch.testing.assert_close(weighed.var, m.var)
    assert (m.mixed(ones).mean - m.mean.mean()).abs() < 1e-3  # one unit of float32 at 1e4


@pytest.mark.parametrize("weights", [[0.5, 0.5], torch.ones(3), torch.ones(2).long(), None])
def test_weights_that_are_none(weights):
    m = flexnorm.moments(torch.randn(2, 5), "n c -> n")
    for call in (m.mixed, m.weighed, lambda w: m.mixed_results(w, 1e-5)):
        with pytest.raises((SpecError, ShapeError), match="weights"):
            call(weights)


@pytest.mark.parametrize("gate", [8, LearnedGate, "learned"])
def test_a_gate_is_a_module(gate):
    with pytest.raises(SpecError, match="a gate is a module"):
        Mixture(["n c -> n", "n c -> c"], gate=gate)
    with pytest.raises(SpecError, match="sizes="):
        Mixture(["n gate -> n", "n gate -> gate"], gate=8)


def test_options_of_the_presets():
    x = torch.randn(2, 8, 3, 3)
    for kind in MADE:
        norm = MADE[kind](bias=False, activation="relu")
        assert norm.bias is None
        assert (norm(x) >= 0).all()
        torch.testing.assert_close(norm(x), MADE[kind]()(x).relu())


# --- over ranks


@pytest.fixture(scope="module")
def two():
    processes = on_ranks.Processes(2)
    yield processes
    processes.close()


SHARDED = {
    "batch": (["n c t -> n c", "n c t -> n", "n c t -> c"], None, 0, "n", [1, 3], {"track_running_stats": True}),
    "batch, masked": (["n c t, n t -> n", "n c t, n t -> c"], "bool", 0, "n", [3, 1], {"track_running_stats": True}),
    "time": (["n c t, n t -> n c", "n c t, n t -> n", "n c t, n t -> c"], "float", 2, "t", [2, 3], {}),
    "a rank with nothing": (["n c t -> n c", "n c t -> c"], None, 0, "n", [0, 4], {"track_running_stats": True}),
}


@pytest.mark.parametrize("mix", ["moments", "results"])
@pytest.mark.parametrize("name", SHARDED)
def test_ranks_together_are_one_process(name, mix, two):
    """In float64, to the rounding of sums in another order: 1e-9 leaves a factor of 1e3 for eps."""
    patterns, kind, cut, sharded, sizes, options = SHARDED[name]
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    mask = None if kind is None else torch.rand(4, 5, generator=generator, dtype=torch.float64)
    mask = mask < 0.7 if kind == "bool" else mask
    options = {**options, "c": 3, "mix": mix, "dtype": torch.float64}
    results = two.run(on_ranks.mixed, patterns, 2 * x + 5, mask, dy, cut, sizes, {**options, "sharded": sharded})
    y, (dx, *gates), running, evaluated = on_ranks.mixed(
        0, 1, patterns, 2 * x + 5, mask, dy, cut, [x.shape[cut]], options
    )
    for place, whole in ((0, y), (3, evaluated)):
        torch.testing.assert_close(torch.cat([r[place] for r in results], cut), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([r[1][0] for r in results], cut), dx, rtol=1e-8, atol=1e-8)
    for k, gate in enumerate(gates):
        torch.testing.assert_close(sum(r[1][k + 1] for r in results), gate, rtol=1e-8, atol=1e-8)
    for result in results:
        for got, want in zip(result[2], running, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_an_error_on_one_rank_is_one_on_all(two):
    x = torch.randn(2, 4, 3, 5)
    patterns, _, cut, sharded, sizes, _ = SHARDED["time"]
    said = two.run(on_ranks.mixed, patterns, x[0], torch.rand(4, 5), x[1], cut, sizes, {"sharded": sharded}, fails=1)
    assert "rank 1 has failed" in said[0]
    patterns = ["n t c -> n c", "n t c -> c"]
    said = two.run(on_ranks.mixed, patterns, x[0], None, x[1], 0, [2, 2], {"sharded": "n"}, fails=1)
    assert all("the same sets" in text for text in said)


def test_threads_that_differentiate_one_graph():
    """What a gradient leaves for the moments' own pass belongs to one backward pass: that of its thread."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    loss = SwitchableNorm(8)(x).pow(3).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    wrong = []

    def work():
        for _ in range(20):
            (found,) = torch.autograd.grad(loss, x, retain_graph=True)
            if not torch.equal(found, expected):
                wrong.append(float((found - expected).abs().max()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
