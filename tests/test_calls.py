"""What a call is asked before a kernel is: odd tensors, who watches, threads; and that nothing stays behind it."""

import gc
import subprocess
import sys
import threading
import weakref

import cases
import pytest
import torch
from torch import nn

from flexnorm import Norm, Partition, SpecError, moments, normalize
from flexnorm.images import ChannelGroupNorm
from flexnorm.library import library, set_up
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm

needs_library = pytest.mark.skipif(isinstance(library(), str), reason="the C++ kernels are left out")
PATTERN = "n (g c) t, n t -> n g"


def by_hand(x, g, mask=None, weight=None, bias=None, eps=1e-5):
    """Group norm of (n, c, t) over valid places, in float64."""
    n, c, t = x.shape
    x, out = x.detach().double(), torch.zeros(n, c, t, dtype=torch.float64)
    for i in range(n):
        valid = torch.ones(t, dtype=torch.bool) if mask is None else mask[i]
        for part in torch.arange(c).chunk(g):
            values = x[i, part][:, valid]
            y = (values - values.mean()) / (values.var(unbiased=False) + eps).sqrt()
            if weight is not None:
                y = y * weight.double()[part, None] + bias.double()[part, None]
            out[i, part[:, None], valid.nonzero()[:, 0]] = y
    return out


def close(y, expected, dtype=torch.float32):
    """Some roundings of values of a few units."""
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=32 * torch.finfo(dtype).eps)


# --- odd tensors -----------------------------------------------------------------------------------------------------


def negated(t):
    """The same values behind a lazy minus sign."""
    hidden = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert hidden.is_neg()
    return hidden


@pytest.mark.parametrize("which", ["x", "weight", "bias", "dy"])
def test_a_lazy_minus_sign_is_not_in_memory(which):
    x, weight, bias, dy = torch.randn(2, 4, 6), torch.randn(4), torch.randn(4), torch.randn(2, 4, 6)
    given = {"x": x, "weight": weight, "bias": bias, "dy": dy}
    results = []
    for change in (lambda t: t, negated):
        now = {name: change(t) if name == which else t for name, t in given.items()}
        leaf = now["x"].detach().requires_grad_()
        y = normalize(leaf, "n (g c) t -> n g", g=2, weight=now["weight"], bias=now["bias"], affine="(g c)")
        (dx,) = torch.autograd.grad(y, leaf, now["dy"])
        results.append((y, dx))
    close(results[0][0], by_hand(x, 2, None, weight, bias))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_lazy_minus_sign_of_weights():
    x, w = torch.randn(2, 4, 6), torch.rand(2, 6)
    y = normalize(x, PATTERN, negated(w), g=2)
    torch.testing.assert_close(y, normalize(x, PATTERN, w, g=2))


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 4, 0)])
def test_no_elements(shape):
    x = torch.randn(shape, requires_grad=True)
    y = normalize(x, "n c t -> n c")
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    norm = Norm("n c t -> n", affine="c", c=shape[1])
    norm(x).sum().backward()
    assert norm.weight.grad.tolist() == [0.0] * shape[1]


def test_meta_sparse_and_nested():
    assert normalize(torch.empty(2, 3, device="meta"), "n c -> n").device.type == "meta"
    for x in (torch.eye(3).to_sparse(), torch.nested.nested_tensor([torch.ones(2, 3)], layout=torch.jagged)):
        with pytest.raises(SpecError, match="x is a dense tensor"):
            normalize(x, "n c -> n" if x.dim() == 2 else "n c t -> n")


class Marked(torch.Tensor):
    """A subclass that sees every operation."""


def test_subclasses_see_what_is_done():
    x = torch.randn(2, 4, 6)
    y = normalize(x.as_subclass(Marked), "n (g c) t -> n g", g=2)
    assert type(y) is Marked
    close(y.as_subclass(torch.Tensor), by_hand(x, 2))
    mask = (torch.rand(2, 6) < 0.7).as_subclass(Marked)
    seen = weakref.ref(mask)
    close(normalize(x, PATTERN, mask, g=2).as_subclass(torch.Tensor), by_hand(x, 2, mask.as_subclass(torch.Tensor)))
    del mask
    gc.collect()
    assert seen() is None  # nothing keeps it


def test_a_tensor_that_outlived_its_transform():
    leaked = []

    def f(x):
        leaked.append(x * 1)
        return x.sum()

    x = torch.randn(2, 4, 6)
    torch.func.grad(f)(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(normalize(leaked[0], "n (g c) t -> n g", g=2), by_hand(x, 2))


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_of_any_dtype(x_dtype, dtype):
    x, weight, bias = torch.randn(2, 4, 6).to(x_dtype), torch.randn(4).to(dtype), torch.randn(4).to(dtype)
    weight.requires_grad_(), bias.requires_grad_()
    y = normalize(x, "n (g c) t -> n g", g=2, weight=weight, bias=bias, affine="(g c)")
    assert y.dtype == x_dtype
    y.sum().backward()
    assert weight.grad.dtype == dtype
    assert bias.grad.dtype == dtype
    close(y.detach(), by_hand(x, 2, None, weight.detach(), bias.detach()), max(x_dtype, torch.float32, key=_coarse))
    close(bias.grad, torch.full((4,), 12.0, dtype=torch.float64), dtype)


def _coarse(dtype):
    return torch.finfo(dtype).eps


def test_operands_of_any_layout():
    x, mask = torch.randn(6, 4, 2).transpose(0, 2), (torch.rand(6, 2) < 0.7).T
    weight, bias = torch.randn(8)[::2], torch.randn(1).expand(4)
    y = normalize(x, PATTERN, mask, g=2, weight=weight, bias=bias, affine="(g c)")
    assert y.stride() == x.stride()
    close(y, by_hand(x, 2, mask, weight, bias))
    strided = torch.randn(2, 4, 12)[..., ::2]
    close(normalize(strided, PATTERN, mask, g=2), by_hand(strided, 2, mask))
    with torch.inference_mode():
        close(normalize(x.clone(), PATTERN, mask, g=2), by_hand(x, 2, mask))


def test_sizes_beyond_64_bits_fit_nothing():
    for pattern, sizes in (("(a b) -> b", {"a": 3, "b": 6148914691236517206}), ("(a b) -> a", {"a": 2**70})):
        with pytest.raises(ValueError, match="size"):
            normalize(torch.randn(2), pattern, **sizes)


def test_a_gradient_that_is_a_lazy_conjugate():
    """Of a layer whose x needs no gradient: sums over parameters alone."""
    norm, part = Norm("n c -> n", affine="c", c=4), torch.randn(3, 4)
    x = torch.randn(3, 4)
    torch.complex(part, norm(x)).conj().abs().pow(2).sum().backward()
    ours, norm.weight.grad = norm.weight.grad, None
    (part.square() + norm(x).square()).sum().backward()
    torch.testing.assert_close(ours, norm.weight.grad)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_counts_of_any_integers(dtype):
    x, m = torch.randn(2, 3), moments(torch.randn(5, 3), "n c -> c")
    narrow = type(m)(m.count.to(dtype), m.mean, m.m2, m.low)
    assert torch.equal(normalize(x, "n c -> c", moments=narrow), normalize(x, "n c -> c", moments=m))


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("count", [None, 5])
@pytest.mark.parametrize("sort", [True, False])
def test_groups_are_what_numpy_says(dtype, count, sort):
    ids = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(1))
    ids = ids.sort()[0] if sort else ids
    p = Partition(ids.to(dtype), count)
    assert p.count == (count or 4)
    assert p.ids.dtype == torch.int64
    assert p.ids.tolist() == ids.tolist()
    assert p.counts.tolist() == torch.bincount(ids, minlength=p.count).tolist()
    assert p.offsets.tolist() == [0, *p.counts.cumsum(0).tolist()]
    assert p.order.tolist() == sorted(range(50), key=lambda i: int(ids[i]))
    assert p.is_sorted == sort
    strided = Partition(torch.stack([ids, ids], 1)[:, 0].to(dtype), count)
    assert strided == p


def test_what_a_partition_hands_out_cannot_reach_a_kernel():
    x, ids = torch.randn(200, 300), torch.tensor([1, 0] * 100)
    p = Partition(ids)
    expected = normalize(x, "v c -> k[v] c", k=p)
    for handed in (p.order, p.offsets, p.counts):
        handed[0] = 10**13
    assert torch.equal(normalize(x, "v c -> k[v] c", k=p), expected)
    p.ids.numpy()[0] = 10**13  # which nobody can see
    assert torch.equal(normalize(x, "v c -> k[v] c", k=p), expected)
    p.ids[0] = 0
    with pytest.raises(SpecError, match="a Partition is immutable"):
        normalize(x, "v c -> k[v] c", k=p)
    assert torch.equal(normalize(x, "v c -> k[v] c", k=Partition(ids)), expected)


def test_labels_made_without_a_check_are_checked():
    p = torch.utils._pytree.tree_map(lambda t: t + 5 if isinstance(t, torch.Tensor) else t, Partition(torch.arange(3)))
    with pytest.raises(ValueError, match="ids are from 0 to count - 1 = 2"):
        normalize(torch.randn(3, 2), "v c -> k[v] c", k=p)


@pytest.mark.parametrize(("first", "second"), [("b[v] c", "c a[v]"), ("a[v] c", "b[v]"), ("b[v]", "b[v] a[v]")])
def test_two_affine_stages_read_their_own_labels(first, second):
    made = torch.Generator().manual_seed(0)
    ids = {name: torch.randint(0, 3, (7,), generator=made) for name in "ab"}
    x, given = torch.randn(7, 3), torch.randn([3] * len(second.split()))
    norm = Norm("v c -> a[v]", affine=first, conditional=second, c=3, a=3, b=3)
    with torch.no_grad():
        norm.weight.normal_()
    y = norm(x, weight=given, a=Partition(ids["a"], 3), b=Partition(ids["b"], 3))
    expected = normalize(x.double(), "v c -> a[v]", a=Partition(ids["a"], 3))
    for weight, axes in ((norm.weight.detach(), first), (given, second)):
        order = [{"a[v]": ids["a"][:, None], "b[v]": ids["b"][:, None], "c": torch.arange(3)}[t] for t in axes.split()]
        expected = expected * weight.double()[tuple(order)]
    close(y.detach(), expected)


def test_a_batch_is_freed_when_the_caller_lets_go():
    norm, seen = Norm("v c -> graph[v] c", affine="c", c=4), []
    gc.disable()
    try:
        for _ in range(20):
            p, x = Partition(torch.arange(9) // 3), torch.randn(9, 4, requires_grad=True)
            norm(x, graph=p).sum().backward()
            seen += [weakref.ref(p), weakref.ref(x)]
        del p, x
        assert not any(ref() is not None for ref in seen)
    finally:
        gc.enable()


# --- who watches -----------------------------------------------------------------------------------------------------


LAYERS = {
    "images": (lambda: ChannelGroupNorm(2, 8), (2, 8, 5, 5), (3, 8, 7, 4)),
    "unequal": (lambda: ChannelGroupNorm(3, 8, groups=[1, 3, 4]), (2, 8, 5, 5), (3, 8, 7, 4)),
    "sequences": (lambda: SequenceGroupNorm(2, 8), (2, 8, 9), (3, 8, 5)),
    "tokens": (lambda: TokenGroupNorm(2, 8), (2, 9, 8), (3, 5, 8)),
    "layer": (lambda: Norm("... c -> ...", affine="c", c=8, activation="silu"), (2, 9, 8), (3, 5, 8)),
    "batch": (lambda: Norm("n c ... -> c", affine="c", c=8, track_running_stats=True), (4, 8, 5), (6, 8, 3)),
    "cumulative": (lambda: Norm("b c t -> b c", cumulative="t"), (2, 4, 9), (3, 4, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_traces_operations(name, grad):
    """A trace holds operations that it can run at other shapes, and no memory that a kernel has written."""
    make, shape, other = LAYERS[name]
    norm = make()
    norm(torch.randn(shape))
    norm.eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(norm, torch.randn(shape), check_trace=False)
        for x in (torch.randn(shape), torch.randn(other)):
            torch.testing.assert_close(traced(x), norm(x), rtol=1e-5, atol=1e-5)


def test_modes_see_operations():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 4, 6)
    with Mode():
        y = normalize(x, "n (g c) t -> n g", g=2)
    assert any("rsqrt" in name for name in seen)
    close(y, by_hand(x, 2))


# --- how tensors are read --------------------------------------------------------------------------------------------


@needs_library
def test_tensors_read_by_their_attributes_are_the_same():
    """What torch before 2.10 offers."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    results = []
    for table in (exchange, None):
        set_up(library(), table)
        try:
            results.append([])
            for case in cases.CASES:
                x, kwargs = cases.arguments(case, dtype=torch.float32, requires_grad=True)
                leaves = cases.leaves(x, kwargs)
                y = normalize(x, case.pattern, kwargs.pop("mask", None), **kwargs)
                (y * torch.arange(y.numel()).reshape(y.shape)).sum().backward()
                results[-1] += [y.detach(), *(t.grad for t in leaves)]
        finally:
            set_up(library(), exchange)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# --- threads and memory ----------------------------------------------------------------------------------------------


def test_threads_share_nothing():
    """One layer, eight threads, other shapes in each: bits of one thread."""
    norm = Norm("b (g c) t, b t -> b g", affine="(g c)", g=2, c=4)
    graphs = Norm("v c -> graph[v] c", affine="c", c=8)

    def results(k):
        made, found = torch.Generator().manual_seed(k), []
        for i in range(40):
            x = torch.randn(2, 8, 3 + (7 * k + i) % 50, generator=made, requires_grad=True)
            mask = torch.rand(2, x.shape[2], generator=made) < 0.8
            y = norm(x, mask)
            found += [y.detach(), *torch.autograd.grad(y.square().sum(), (x, norm.weight))]
            v = torch.randn(5 + (3 * k + i) % 40, 8, generator=made)
            found.append(graphs(v, graph=torch.randint(0, 4, (len(v),), generator=made)).detach())
        return found

    expected, found = [results(k) for k in range(8)], [None] * 8

    def work(k):
        found[k] = results(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


GROWTH = """
import resource, sys, torch
from flexnorm import Norm, Partition, moments, normalize
from flexnorm.images import ChannelGroupNorm
torch.set_num_threads(1)
group, graphs = ChannelGroupNorm(2, 8), Norm("v c -> graph[v] c", affine="c", c=8)
tokens = Norm("b t (g c), b t -> b t g", g=2, c=4)
buffer, made = torch.randn(1 << 18), torch.Generator().manual_seed(0)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4
def go(n, first):
    for i in range(first, first + n):
        t = 1 + i % 997
        group(buffer[: 16 * (50 + t)].view(2, 8, 50 + t)[:, :, : 1 + i % 50])  # ever new strides
        graphs(buffer[: 8 * t].view(t, 8), graph=torch.randint(0, 1 + i % 7, (t,), generator=made))
        tokens(buffer[: 16 * t].view(2, t, 8), torch.ones(2, t, dtype=torch.bool))
        group.eps = 1e-5 + i * 1e-12
        normalize(buffer[: 3 * t].view(3, t), "n c -> n", eps=1e-5 + i * 1e-12)
        moments(buffer[: 3 * t].view(3, t), "n (g c) -> n g", g=1)
n = int(sys.argv[1])
go(1500, 0)  # formulas by eps are kept up to a bound
before = resident()
go(n - 1500, 1500)
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("calls", [4000, pytest.param(40000, marks=pytest.mark.long)])
def test_nothing_grows_with_shapes(calls):
    """Five calls each time, all with shapes, strides, labels and eps that are new; in KiB."""
    done = subprocess.run([sys.executable, "-c", GROWTH, str(calls)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 8192  # 6000 shapes alone took 22 MB when each was kept


def test_running_statistics_move_as_torch_moves_them():
    ours, theirs = Norm("n c t -> c", affine="c", c=3, track_running_stats=True, momentum=0.3), nn.BatchNorm1d(3)
    theirs.momentum = 0.3
    for k in range(4):
        x = torch.randn(5, 3, 4 + k) * 10**k + 100 * k
        version = ours.running_mean._version
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
        assert ours.running_mean._version > version
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-5, atol=1e-5)
        assert ours.num_batches_tracked == theirs.num_batches_tracked


def test_running_statistics_that_backward_needs_are_noticed():
    norm = Norm("n c -> c", c=3, track_running_stats=True)
    norm(torch.randn(8, 3))
    norm.eval()
    x = torch.randn(4, 3, requires_grad=True)
    y = norm(x)
    norm.train()
    norm(torch.randn(8, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weighed_batches_move_running_statistics():
    norm = Norm("n c, n -> c", c=2, track_running_stats=True, momentum=0.5)
    x, w = torch.randn(6, 2), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25])
    norm(x, w)
    m = moments(x.double(), "n c, n -> c", w.double())
    torch.testing.assert_close(norm.running_mean.double(), m.mean / 2)
    torch.testing.assert_close(norm.running_var.double(), 0.5 + m.var / 2)
