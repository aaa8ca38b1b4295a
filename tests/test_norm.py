"""`Norm` as a module, and `given`."""

import copy
import io
import pickle
import threading

import cases
import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flexnorm import Norm, Partition, ShapeError, SpecError, given, normalize
from flexnorm.calls import given as names_of_graphs
from flexnorm.calls.call import Used

MASKED = ("b t (g c), b t -> b g", {"affine": "(g c)", "g": 2, "sizes": {"(g c)": 6}})


def told(case):
    """Sizes of all axes that a layer may need when it is built."""
    if "..." not in case.pattern:
        groups = oracle.read(case.pattern.split("->")[0].split(",")[0])
        known = oracle.sizes_of(groups, case.shape, case.sizes)
        return {name: size for name, size in known.items() if "fixed" not in name}
    if case.affine is None:
        return case.sizes
    channels = case.shape[1 if case.pattern.startswith("n") else -1]
    return {"(g c)": channels, **case.sizes} if "(g c)" in case.pattern else {"c": channels}


@pytest.mark.parametrize("where", ["static", "dynamic", "given"])
@pytest.mark.parametrize("case", **cases.each)
def test_layer_equals_function(case, where):
    x, kwargs = cases.arguments(case)
    expected = normalize(x, case.pattern, **kwargs)
    counts = {name: p.count for name, p in kwargs["labels"].items()}
    norm = Norm(
        case.pattern,
        affine=case.affine,
        sizes=told(case),
        labels=kwargs["labels"] if where == "static" else counts,
        dtype=torch.float64,
        **case.options,
    )
    with torch.no_grad():
        for name in ("weight", "bias"):
            if kwargs.get(name) is not None:
                getattr(norm, name).copy_(kwargs[name])
    mask, labels = kwargs.get("mask"), kwargs["labels"]
    if where == "given":
        with given(mask=mask, **labels):
            y = nn.Sequential(norm, nn.Identity())(x)
    else:
        y = norm(x, mask, labels=None if where == "static" else labels)
    # The layer was told sizes that the function was not, so it may cut x elsewhere and add in another order.
    torch.testing.assert_close(y, expected, rtol=0, atol=16 * torch.finfo(y.dtype).eps * float(expected.abs().max()))
    assert case.pattern.split("->")[1].strip() in repr(norm)


def test_repr_shows_pattern_sizes_shapes_and_what_is_not_default():
    norm = Norm("v c -> type[v] c", affine="type[v] c", c=4, type=3, eps=1e-3, activation="silu", bias=False)
    assert repr(norm) == (
        "Norm('v c -> type[v] c', c=4, type=3, affine='type[v] c', weight=[3, 4], eps=0.001, activation='silu')"
    )
    assert "band=Partition(7 ids, count=2)" in repr(Norm("n f -> band[f]", band=Partition.from_sizes([3, 4])))
    conditional = Norm("b (g c) t -> b g", g=2, conditional="b (g c)", center=False)
    assert "conditional='b (g c)'" in repr(conditional)
    assert "center=False" in repr(conditional)


@pytest.mark.parametrize(
    ("affine", "sizes", "shape"),
    [
        ("(g c)", {"g": 4, "sizes": {"(g c)": 8}}, (8,)),
        ("(g c)", {"g": 4, "c": 2}, (8,)),
        ("g c", {"c": 2, "sizes": {"( g  c )": 8}}, (4, 2)),
        ("c", {"c": 2}, (2,)),
        ("(c g)", {"g": 4, "c": 2}, (8,)),
        ("kind[n] (g c)", {"g": 4, "c": 2, "kind": 3}, (3, 8)),
        ("1 c", {"c": 2}, (1, 2)),
    ],
)
def test_shape_of_parameters(affine, sizes, shape):
    norm = Norm("n (g c) ... -> n g", affine=affine, **sizes)
    assert norm.weight.shape == norm.bias.shape == shape
    assert (norm.weight == 1).all()
    assert (norm.bias == 0).all()


def test_names_of_state():
    norm = Norm("v f -> graph[v] band[f]", affine="band[f]", band=Partition.from_sizes([2, 3]))
    assert list(norm.state_dict()) == ["weight", "bias", "band_ids"]
    assert Norm("n c -> n", affine="c", c=3, bias=False).bias is None
    assert list(Norm("n c -> n").state_dict()) == []


def test_static_labels_are_state():
    a = Norm("n f -> n band[f]", band=Partition(torch.tensor([0, 0, 1, 1])))
    b = Norm("n f -> n band[f]", band=Partition(torch.tensor([1, 0, 1, 0])))
    x = torch.randn(2, 4)
    expected = a(x)
    assert not torch.equal(b(x), expected)
    b.load_state_dict(a.state_dict())
    assert torch.equal(b(x), expected)
    b.reset_parameters()  # as the layer was built
    assert torch.equal(b(x), normalize(x, "n f -> n band[f]", band=torch.tensor([1, 0, 1, 0])))


@pytest.mark.parametrize("travel", ["pickle", "deepcopy", "save"])
def test_travels(travel):
    norm = Norm("n f -> n band[f]", affine="band[f]", band=Partition.from_sizes([2, 3]), activation="relu")
    x = torch.randn(3, 5)
    y = norm(x)
    y.sum().backward()
    if travel == "pickle":
        other = pickle.loads(pickle.dumps(norm))
    elif travel == "deepcopy":
        other = copy.deepcopy(norm)
    else:
        file = io.BytesIO()
        torch.save(norm.state_dict(), file)
        file.seek(0)
        other = Norm("n f -> n band[f]", affine="band[f]", band=Partition.from_sizes([1, 4]), activation="relu")
        other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), y)
    assert repr(other).replace("count", "") == repr(norm).replace("count", "")


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_a_copy_sees_labels_that_are_loaded_into_it(travel):
    """What was worked out for the labels of the first one must not be taken for the copy's."""
    a, b = (Norm("n f -> n band[f]", band=Partition.from_sizes(sizes)) for sizes in ([2, 4], [3, 3]))
    x = torch.randn(4, 6)
    a.load_state_dict(a.state_dict())
    a(x)
    other = travel(a)
    other.load_state_dict(b.state_dict())
    assert torch.equal(other(x), b(x))


def test_labels_written_in_inference_mode_and_under_vmap():
    x = torch.randn(4, 6)
    with torch.inference_mode():
        norm, other = (Norm("n f -> n band[f]", band=Partition.from_sizes(sizes)) for sizes in ([2, 4], [3, 3]))
        norm(x)
        norm.load_state_dict(other.state_dict())
        assert torch.equal(norm(x), other(x))
    models = [Norm("n f -> n band[f]", affine="f", f=6, band=Partition.from_sizes(sizes)) for sizes in ([2, 4], [3, 3])]
    params, buffers = torch.func.stack_module_state(models)
    assert buffers == {}
    ids = {"band_ids": torch.stack([model.labels["band"].ids for model in models])}

    def call(params, ids):
        return torch.func.functional_call(models[0], (params, ids), (x,))

    torch.testing.assert_close(torch.func.vmap(call)(params, ids), torch.stack([model(x) for model in models]))
    copy.deepcopy(models[0])


def test_unchanged_labels_are_not_built_again():
    norm = Norm("n f -> n band[f]", band=Partition.from_sizes([2, 4]))
    norm(torch.randn(2, 6))
    before = norm.labels["band"]
    norm.load_state_dict(norm.state_dict())
    assert norm.labels["band"] is before


def test_built_on_the_default_device():
    with torch.device("meta"):
        norm = Norm("n f -> n band[f]", affine="f", f=5, band=Partition.from_sizes([2, 3]))
    assert norm.weight.is_meta
    norm.to_empty(device="cpu").reset_parameters()
    assert norm.labels["band"].ids.tolist() == [0, 0, 1, 1, 1]


def test_an_axis_may_be_called_self():
    x = torch.randn(2, 6)
    assert torch.equal(Norm("n (self c) -> n self", self=2)(x), normalize(x, "n (g c) -> n g", g=2))


def test_dtype_and_device_moves():
    norm = Norm("n f -> n band[f]", affine="f", band=Partition.from_sizes([2, 3]), f=5)
    assert norm.half()(torch.randn(2, 5).half()).dtype == torch.float16
    assert norm.labels["band"].ids.dtype == torch.int64
    meta = Norm("n f -> n band[f]", affine="f", band=Partition.from_sizes([2, 3]), f=5, device="meta")
    assert meta.weight.is_meta
    x = torch.randn(2, 5)
    ready = meta.to_empty(device="cpu")
    ready.reset_parameters()
    assert torch.equal(ready(x), Norm("n f -> n band[f]", band=Partition.from_sizes([2, 3]))(x))
    skipped = nn.utils.skip_init(Norm, "n c -> n", affine="c", c=3)
    assert skipped.weight.shape == (3,)


def test_meta_tensors_pass_through():
    norm = Norm("n f -> n band[f]", affine="f", band=Partition.from_sizes([2, 3]), f=5, device="meta")
    assert norm(torch.empty(2, 5, device="meta")).shape == (2, 5)


# --- conditional ---


@pytest.mark.parametrize("affine", [None, "(g c)", "kind[b] c"])
@pytest.mark.parametrize(
    ("conditional", "shape"), [("b (g c)", (3, 6)), ("b", (3,)), ("t c g b", (4, 3, 2, 3)), ("kind[b] g", (2, 2))]
)
def test_conditional_parameters_come_after_the_learned_ones(affine, conditional, shape):
    kind = Partition(torch.tensor([0, 1, 0]))
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    norm = Norm(
        "b (g c) t -> b g",
        affine=affine,
        conditional=conditional,
        g=2,
        c=3,
        labels={"kind": 2} if affine == "kind[b] c" or "kind" in conditional else {},
        dtype=torch.float64,
    )
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    w, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    labels = {"kind": kind} if norm._counts else {}

    def stage(x, axes, weight, bias):
        """Only the affine part of the formula, element by element."""
        p = oracle.Pattern("b (g c) t -> b g", x.shape, {"g": 2}, {"kind": kind})
        places = [p.place(axes, e) for e in p.elements]
        flat = [
            v * (1 if weight is None else weight[q]) + (0 if bias is None else bias[q])
            for v, q in zip(x.flatten(), places, strict=True)
        ]
        return torch.stack(flat).reshape(x.shape)

    plain = oracle.normalize(x, "b (g c) t -> b g", sizes={"g": 2})
    learned = plain if affine is None else stage(plain, affine, norm.weight, norm.bias)
    for weight, bias in ((w, b), (w, None), (None, b)):
        y = norm(x, weight=weight, bias=bias, labels=labels)
        torch.testing.assert_close(y, stage(learned, conditional, weight, bias), rtol=1e-10, atol=1e-10)


def test_adaptive_group_norm_of_diffusion_models():
    """GN(x) * (1 + scale) + shift."""
    x, scale, shift = torch.randn(2, 8, 4, 4), torch.randn(2, 8), torch.randn(2, 8)
    norm = Norm("n (g c) h w -> n g", affine="(g c)", conditional="n (g c)", g=4, c=2)
    expected = nn.functional.group_norm(x, 4) * (1 + scale)[..., None, None] + shift[..., None, None]
    torch.testing.assert_close(norm(x, weight=1 + scale, bias=shift), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conditional_in_half_precision_is_rounded_once(dtype):
    norm = Norm("n c -> n", affine="c", conditional="n c", c=4, dtype=dtype)
    x, w = (torch.randn(2, 4) * 1e-3).to(dtype), torch.full((2, 4), 300.0).to(dtype)
    nn.init.constant_(norm.weight, 300)  # the product of the weights alone is no float16
    plain = oracle.normalize(x, "n c -> n")
    y = norm(x, weight=w).double()
    assert ((y - plain * 9e4).abs() <= torch.finfo(dtype).eps * (plain * 9e4).abs() + 0.1).all()


def test_conditional_gradients_reach_everything():
    norm = Norm("b c t -> b", affine="c", conditional="b c", c=3, dtype=torch.float64)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 3), (2, 3)))

    def f(x, w, b, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,), {"weight": w, "bias": b})

    assert torch.autograd.gradcheck(f, (x, w, b, norm.weight, norm.bias))


# --- given ---


def test_explicit_wins_over_given_and_inner_over_outer():
    x = torch.randn(4, 3)
    norm = Norm("v c -> graph[v] c")
    ids = [torch.tensor(i) for i in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 1])]
    with given(graph=ids[0]):
        assert torch.equal(norm(x), norm(x, graph=ids[0]))
        with given(graph=ids[1]):
            assert torch.equal(norm(x), normalize(x, "v c -> graph[v] c", graph=ids[1]))
            assert torch.equal(norm(x, graph=ids[2]), normalize(x, "v c -> graph[v] c", graph=ids[2]))
        assert torch.equal(norm(x), normalize(x, "v c -> graph[v] c", graph=ids[0]))
    with pytest.raises(SpecError, match="not given"):
        norm(x)


def test_given_reaches_only_what_reads_it(monkeypatch):
    monkeypatch.setattr(names_of_graphs, "_TRACED", set())  # other tests have compiled layers with masks
    x = torch.randn(4, 3)
    nobody = pytest.warns(UserWarning, match="none of them takes it\n  received: mask=a Tensor of torch.bool, shape")
    with nobody, given(graph=torch.tensor([0, 0, 1, 1]), mask=torch.ones(7, 7, dtype=torch.bool)):
        assert torch.equal(Norm("v c -> c")(x), normalize(x, "v c -> c"))
        assert torch.equal(
            Norm("v c -> graph[v]")(x), normalize(x, "v c -> graph[v]", graph=torch.tensor([0, 0, 1, 1]))
        )
    static = Norm("v c -> unheard[v]", unheard=Partition.from_sizes([1, 3]))
    with pytest.warns(UserWarning, match="unheard"), given(unheard=torch.tensor([0, 0, 0, 0])):
        assert torch.equal(static(x), normalize(x, "v c -> graph[v]", graph=Partition.from_sizes([1, 3])))


def test_a_given_value_that_does_not_fit_names_the_layer():
    model = nn.Sequential(nn.Linear(3, 5), Norm("v c -> graph[v] c", affine="c", c=5))
    with pytest.raises(ShapeError) as caught, given(graph=torch.tensor([0, 1])):
        model(torch.randn(4, 3))
    assert "Norm('v c -> graph[v] c', c=5, affine='c', weight=[5], bias=[5]), inside of given(graph)" in str(
        caught.value
    )
    with pytest.raises(SpecError, match=r"inside of given\(grpah\)"), given(grpah=torch.tensor([0, 1])):
        model(torch.randn(4, 3))


def test_given_is_left_on_exceptions_and_can_be_used_again():
    norm, x, again = Norm("v c -> graph[v]"), torch.randn(2, 3), given(graph=torch.tensor([0, 1]))
    with pytest.raises(KeyError), again:
        raise KeyError
    with again, again:
        norm(x)
    with pytest.raises(SpecError):
        norm(x)
    with pytest.raises(SpecError, match="from_sizes"):
        given(graph=[1, 1])


def test_threads_do_not_see_each_other():
    norm, x, failed = Norm("v c -> graph[v]"), torch.randn(2, 3), []

    def other():
        try:
            norm(x)
        except SpecError:
            failed.append(True)

    with given(graph=torch.tensor([0, 1])):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert failed == [True]


def test_one_given_in_many_threads():
    norm, x, shared, failed = Norm("v c -> graph[v]"), torch.randn(2, 3), given(graph=torch.tensor([0, 1])), []
    entered = threading.Barrier(2)

    def use():
        try:
            with shared:
                entered.wait()
                norm(x)
                entered.wait()
        except Exception as error:  # whatever it is, the test names it
            failed.append(error)

    threads = [threading.Thread(target=use) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failed == []


def test_given_reaches_a_backward_pass_on_a_thread_of_its_own():
    """As on a GPU: autograd's worker does not know the `with` block that backward() is called in."""
    pattern, options = MASKED
    norm, x, mask = Norm(pattern, **options), torch.randn(2, 5, 6), torch.rand(2, 5) < 0.6
    norm(x, mask).square().sum().backward()
    expected = norm.weight.grad.clone()
    norm.zero_grad()
    with given(mask=mask):
        loss = checkpoint(norm, x.requires_grad_(), use_reentrant=False).square().sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    torch.testing.assert_close(norm.weight.grad, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("way", ["inside", "context_fn", "outside"])
def test_given_under_activation_checkpointing(use_reentrant, way):
    pattern, options = MASKED
    model = nn.Sequential(nn.Linear(6, 6), Norm(pattern, **options))
    x, mask = torch.randn(2, 5, 6, requires_grad=True), torch.rand(2, 5) < 0.6
    with given(mask=mask):
        model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    extra = {"context_fn": given.context_fn} if way == "context_fn" and not use_reentrant else {}
    with given(mask=mask):
        loss = checkpoint(model, x, use_reentrant=use_reentrant, **extra).square().sum()
        if way == "inside" or (way == "context_fn" and use_reentrant):
            loss.backward()
    if way == "outside":
        with pytest.raises(RuntimeError, match="what was given is gone"):
            loss.backward()
        return
    if way == "context_fn" and not use_reentrant:
        loss.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


# --- names ---


@pytest.mark.parametrize("name", ["eps", "scale", "mask", "weight", "x", "device", "labels", "pattern", "momentum"])
def test_axes_may_have_the_names_of_options(name):
    x = torch.randn(2, 6)
    expected = normalize(x, "n (g c) -> n g", g=2)
    text = f"n ({name} c) -> n {name}"
    assert torch.equal(normalize(x, text, sizes={name: 2}), expected)
    norm = Norm(text, affine=f"({name} c)", sizes={name: 2, f"({name} c)": 6})
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("name", ["eps", "scale", "mask", "weight", "x", "labels", "moments"])
def test_labels_may_have_the_names_of_options(name):
    x, ids = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    expected = normalize(x, "v c -> graph[v] c", graph=ids)
    assert torch.equal(normalize(x, f"v c -> {name}[v] c", labels={name: ids}), expected)
    assert torch.equal(Norm(f"v c -> {name}[v] c")(x, labels={name: ids}), expected)


class LastToFirst(Norm):
    """Channels last, whatever the pattern says."""

    def fit_call(self, call):
        return super().fit_call(call._replace(x=call.x.movedim(-1, 1)))

    def unfit(self, call, y):
        assert call.x.shape == y.movedim(1, -1).shape
        return y.movedim(1, -1)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_fits_the_call_and_gives_the_container_back(compiled):
    built = {"affine": "(g c)", "g": 2, "c": 3}
    theirs = Norm("n (g c) ... -> n g", **built)
    ours = LastToFirst("n (g c) ... -> n g", **built)
    x = torch.randn(4, 5, 5, 6, requires_grad=True)
    y = (torch.compile(ours, fullgraph=True) if compiled else ours)(x)
    expected = theirs(x.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))


class HalfCentred(Norm):
    """Subtracts half of the mean."""

    tracked = 0

    def used(self, call, own):
        def track():
            self.tracked += 1

        return Used(own.about(torch.tensor(0.5)), own, track)


def test_a_layer_normalizes_by_moments_that_it_makes():
    norm, x = HalfCentred("n c t -> n c", eps=0.0), torch.randn(3, 4, 50) + 2
    mean = x.mean(-1, keepdim=True)
    expected = (x - mean / 2) / (x - mean / 2).square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)
    assert norm.tracked == 1
    y, seen = norm(x, return_moments=True)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.mean, mean[..., 0], rtol=1e-5, atol=1e-5)
    assert norm.tracked == 1  # a call that wants the moments moves nothing


class Halves(Norm):
    """A mask that the layer makes itself."""

    def fit_mask(self, x, mask):
        return (torch.arange(x.shape[-1]) < x.shape[-1] // 2).expand(x.shape[0], -1)


def test_a_mask_that_a_layer_makes_holds_on_every_way():
    norm, x = Halves("n c t, n t -> n"), torch.randn(3, 4, 10)
    expected = normalize(x, "n c t, n t -> n", norm.fit_mask(x, None))
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x, return_moments=True)[0], expected)


def test_a_layer_of_ones_own_takes_nothing_from_around_for_its_own_arguments():
    class Adaptive(Norm):
        def forward(self, x, cond, scale=None):
            return super().forward(x, weight=cond)

    class Plain(Norm):
        def forward(self, x, batch=None):
            return super().forward(x)

    x, cond = torch.randn(2, 4, 3), torch.randn(2, 4)
    norm = Adaptive("b c t -> b", conditional="b c")
    names_of_graphs._TRACED.update(("cond", "batch", "scale"))
    with given(cond=cond, batch=torch.tensor([0, 1]), scale=cond):
        torch.testing.assert_close(norm(x, cond), normalize(x, "b c t -> b", weight=cond, affine="b c"))
        torch.testing.assert_close(Plain("b c t -> b")(x), normalize(x, "b c t -> b"))


def test_running_statistics_that_are_set_later_are_used():
    norm, x = Norm("n c ... -> c", c=4), torch.randn(5, 4, 3)
    norm.running_mean, norm.running_var = torch.zeros(4), torch.ones(4)
    norm.num_batches_tracked = torch.tensor(1)
    torch.testing.assert_close(norm.eval()(x), x / (1 + 1e-5) ** 0.5)


def test_a_hook_of_the_weight_sees_gradients_only():
    norm, x = Norm("n c -> n", affine="c", c=4), torch.randn(3, 4, requires_grad=True)
    norm.weight.register_hook(lambda g: g * 2)
    _, m = norm(x, return_moments=True)
    m.mean.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.25))
    assert norm.weight.grad is None
