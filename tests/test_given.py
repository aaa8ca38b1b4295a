"""What is given around layers: names of every layer, blocks that end elsewhere, names that no layer takes."""

import asyncio
import contextvars
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flexnorm import Norm, Partition, ShapeError, given, normalize
from flexnorm.calls import given as module
from flexnorm.images import ChannelGroupNorm
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm
from flexnorm.spectrograms import CepstralNorm, MelBandNorm

X = torch.randn(3, 10, 8)
LENGTHS = torch.tensor([10, 4, 7])
VALID = torch.arange(10) < LENGTHS[:, None]


def of(*layers):
    return nn.Sequential(*layers)


# --- whatever a forward takes by keyword


@pytest.mark.parametrize(
    ("name", "value"),
    [("lengths", LENGTHS), ("key_padding_mask", ~VALID), ("mask", VALID), ("mask", VALID.long())],
)
def test_what_a_sequence_layer_takes_by_keyword_works_from_around(name, value):
    layer = SequenceGroupNorm(2, 8, channels_last=True)
    with given(**{name: value}):
        y = of(nn.Identity(), layer)(X)
    torch.testing.assert_close(y, layer(X, **{name: value}), rtol=0, atol=0)
    torch.testing.assert_close(y[1, :4], layer(X[1:2, :4])[0])
    assert not y[1, 4:].any()


def test_packed_rows_take_where_sequences_begin_and_padded_ones_take_lengths():
    packed, padded = SequenceGroupNorm(2, 8), SequenceGroupNorm(2, 8, channels_last=True)
    rows = torch.cat([x[:n] for x, n in zip(X, LENGTHS, strict=True)])
    offsets = torch.tensor([0, 10, 14, 21])
    with given(cu_seqlens=offsets, lengths=LENGTHS):
        y, z = packed(rows), padded(X)
    torch.testing.assert_close(y, packed(rows, cu_seqlens=offsets), rtol=0, atol=0)
    torch.testing.assert_close(z, padded(X, lengths=LENGTHS), rtol=0, atol=0)


@pytest.mark.extras
def test_a_number_of_graphs_comes_with_graphs_from_around():
    pytest.importorskip("torch_geometric", reason="the layers are PyG's")
    from flexnorm.graphs import FeatureGroupNorm, GraphNorm, InstanceNorm

    x, ids = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    for norm in (InstanceNorm(4), FeatureGroupNorm(4), GraphNorm(4)):
        with given(batch=ids):
            torch.testing.assert_close(norm(x, None, 3), norm(x, ids, 3), rtol=0, atol=0)
            with pytest.raises(ShapeError, match="from 0 to batch_size - 1"):
                norm(x, None, 2)


def test_lengths_that_are_passed_win_over_a_mask_from_around():
    layer, x = CepstralNorm("utterance"), X.mT.contiguous()
    with given(mask=torch.ones(3, 10, dtype=torch.bool)):
        torch.testing.assert_close(layer(x, LENGTHS), CepstralNorm("utterance")(x, mask=VALID), rtol=0, atol=0)


def test_what_is_passed_wins_over_what_is_given():
    layer = SequenceGroupNorm(2, 8, channels_last=True)
    expected = layer(X, lengths=LENGTHS)
    with given(mask=torch.zeros(3, 10, dtype=torch.bool), key_padding_mask=VALID):
        torch.testing.assert_close(layer(X, lengths=LENGTHS), expected, rtol=0, atol=0)
        torch.testing.assert_close(layer(X, VALID), expected, rtol=0, atol=0)


def test_a_mask_from_around_comes_before_lengths():
    layer, mask = TokenGroupNorm(2, 8), torch.rand(3, 10) < 0.7
    with given(mask=mask, lengths=LENGTHS):
        y = layer(X)
    torch.testing.assert_close(y, layer(X, mask), rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda: MelBandNorm(2, num_frequencies=8), lambda: CepstralNorm("utterance")])
def test_spectrograms_take_lengths_from_around(make):
    layer, x = make(), X.mT.contiguous()
    with given(lengths=LENGTHS):
        y = layer(x)
    torch.testing.assert_close(y, layer(x, LENGTHS), rtol=0, atol=0)
    assert (y - layer(x)).abs().max() > 0.01


def test_a_length_that_does_not_fit_names_the_layer():
    with pytest.raises(ValueError, match=r"inside of given\(lengths\)"), given(lengths=torch.tensor([1, 2])):
        SequenceGroupNorm(2, 8, channels_last=True)(X)


@pytest.mark.extras
def test_graphs_take_types_and_batches():
    pytest.importorskip("torch_geometric", reason="the layers are PyG's")
    from flexnorm.graphs import FeatureGroupNorm, GraphNorm, HeteroLayerNorm

    x, ids = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 2])
    typed, norm, group = HeteroLayerNorm(4, 3), GraphNorm(4), FeatureGroupNorm(4)
    nn.init.normal_(typed.weight)
    with given(type_ptr=torch.tensor([0, 2, 5, 6]), batch=ids):
        y, z, g = typed(x), norm(x), group(x)
    torch.testing.assert_close(y, typed(x, ids), rtol=0, atol=0)
    torch.testing.assert_close(z, norm(x, ids), rtol=0, atol=0)
    torch.testing.assert_close(g, group(x, ids), rtol=0, atol=0)
    with given(type_ptr=torch.tensor([0, 1, 2, 6])):  # what is passed wins
        torch.testing.assert_close(typed(x, ids), y, rtol=0, atol=0)


# --- names that nobody takes


@pytest.mark.parametrize("name", ["attention_mask", "lenghts", "masks"])
def test_a_name_that_no_layer_takes_is_a_warning_at_the_end(name):
    layer = SequenceGroupNorm(2, 8, channels_last=True)
    said = rf"none of them takes it\n  received: {name}=a Tensor"
    with pytest.warns(UserWarning, match=said) as seen, given(**{name: VALID}):
        layer(X)
    assert seen[0].filename == __file__


def test_every_name_is_taken_by_some_layer():
    model = of(ChannelGroupNorm(2, 10), Norm("b t c -> b kind[c]"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with given(kind=torch.tensor([0, 1] * 4), mask=torch.ones(3, 8, dtype=torch.bool)):
            model(X)


@pytest.mark.parametrize("what", ["no layer", "an error"])
def test_nothing_is_said_where_no_layer_of_ours_ran(what):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if what == "no layer":
            with given(lenghts=LENGTHS):
                nn.LayerNorm(8)(X)
        else:
            block = given(lenghts=LENGTHS)
            block.__enter__()
            Norm("b t c -> b")(X)
            block.__exit__(KeyError, KeyError(), None)


def test_a_name_that_an_inner_block_says_again_is_taken():
    layer = Norm("b t c, b t -> b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with given(mask=~VALID), given(mask=VALID):
            y = layer(X)
    torch.testing.assert_close(y, layer(X, VALID), rtol=0, atol=0)


def test_a_layer_in_a_graph_takes_its_names_where_it_is_traced():
    model = torch.compile(of(Norm("b t c, b t -> b tracedname[c]")), fullgraph=True, backend="aot_eager")
    eager = Norm("b t c -> b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # traced, then replayed
            with given(mask=VALID, tracedname=torch.tensor([0, 1] * 4)):
                model(X), eager(X)


# --- blocks that end elsewhere


def opened(**values):
    with given(**values):
        yield


def test_a_block_that_is_closed_in_another_thread_is_over():
    layer = Norm("b t c, b t -> b")
    generator = opened(mask=VALID)
    next(generator)
    torch.testing.assert_close(layer(X), layer(X, VALID))
    thread = threading.Thread(target=lambda: next(generator, None))
    thread.start()
    thread.join()
    torch.testing.assert_close(layer(X), normalize(X, "b t c -> b"))
    assert not module._OPEN
    with given(mask=~VALID):  # and the next one begins
        torch.testing.assert_close(layer(X), layer(X, ~VALID))
    torch.testing.assert_close(layer(X), normalize(X, "b t c -> b"))


def test_a_block_that_is_closed_elsewhere_holds_no_tensors():
    mask = torch.ones(3, 10, dtype=torch.bool)
    held, generator = weakref.ref(mask), opened(mask=mask)
    next(generator)
    thread = threading.Thread(target=next, args=(generator, None))
    thread.start()
    thread.join()
    del mask, generator
    gc.collect()
    assert held() is None


def test_blocks_that_are_closed_out_of_order():
    layer = Norm("b t c, b t -> b kind[c]")
    kind, plain = torch.tensor([0, 1] * 4), "b t c -> b kind[c]"
    first, second = opened(mask=VALID), opened(kind=kind)
    next(first), next(second)
    torch.testing.assert_close(layer(X), layer(X, VALID, kind=kind))
    next(first, None)
    torch.testing.assert_close(layer(X), normalize(X, plain, kind=kind))
    next(second, None)
    assert not module._OPEN
    with pytest.raises(ValueError, match="'kind' is read"):
        layer(X)


def test_a_generator_that_is_thrown_away_ends_its_block():
    generator = opened(mask=VALID)
    next(generator)
    del generator
    gc.collect()
    assert not module._OPEN


def test_one_object_opens_blocks_in_two_threads():
    layer, block = Norm("b t c, b t -> b"), given(mask=VALID)
    inside, leave, found = threading.Event(), threading.Event(), []

    def work():
        with block:
            inside.set()
            leave.wait(10)
            found.append(layer(X))

    thread = threading.Thread(target=work)
    with block:
        thread.start()
        inside.wait(10)
    torch.testing.assert_close(layer(X), normalize(X, "b t c -> b"))
    leave.set()
    thread.join()
    torch.testing.assert_close(found[0], layer(X, VALID))
    assert not module._OPEN


def test_tasks_see_their_own_blocks():
    layer, masks = Norm("b t c, b t -> b"), [VALID, ~VALID]

    async def one(mask):
        with given(mask=mask):
            await asyncio.sleep(0.01)
            return layer(X)

    async def both():
        return await asyncio.gather(*map(one, masks))

    for y, mask in zip(asyncio.run(both()), masks, strict=True):
        torch.testing.assert_close(y, layer(X, mask))


def test_tasks_share_one_object():
    layer, block = Norm("b t c, b t -> b"), given(mask=VALID)
    plain = normalize(X, "b t c -> b")

    async def one(first, second):
        await asyncio.sleep(first)
        with block:
            await asyncio.sleep(second)
            inside = layer(X)
        return inside, layer(X)

    async def both():
        return await asyncio.gather(one(0, 0.02), one(0.01, 0.03))

    for inside, after in asyncio.run(both()):
        torch.testing.assert_close(inside, layer(X, VALID))
        torch.testing.assert_close(after, plain)
    assert not module._OPEN


def test_a_context_that_was_copied_inside_sees_nothing_after_the_end():
    layer = Norm("b t c, b t -> b")
    with given(mask=VALID):
        inside = contextvars.copy_context()
    with given(mask=~VALID):  # some block is open, so that layers look
        torch.testing.assert_close(inside.run(layer, X), normalize(X, "b t c -> b"))


# --- backward passes


def test_a_layer_runs_in_a_hook_of_a_backward_pass():
    layer, x = Norm("b t c, b t -> b"), X.clone().requires_grad_()
    with given(mask=VALID):
        layer(x)
    found = []
    z = x * 2
    z.register_hook(lambda g: found.append(layer(g.detach())))
    z.sum().backward()
    torch.testing.assert_close(found[0], normalize(torch.ones_like(X), "b t c -> b"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_says_that_what_was_given_is_gone(reentrant):
    layer, x = Norm("b t c, b t -> b"), X.clone().requires_grad_()
    with given(mask=VALID):
        y = checkpoint(layer, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="what was given is gone"):
        y.sum().backward()
    with given(mask=VALID):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.square().sum().backward()
    expected = X.clone().requires_grad_()
    layer(expected, VALID).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_evaluation_inside_of_a_block_leaves_nothing_behind():
    """A layer that was given something without gradients is no layer of a checkpointed forward for ever."""
    layer, x = Norm("b t c, b t -> b"), X.clone().requires_grad_()
    with torch.no_grad(), given(mask=VALID):
        layer(x)
    layer(x)
    y = checkpoint(layer, x, use_reentrant=True)
    y.sum().backward()


def test_a_partition_that_does_not_fit_is_an_error_of_the_layer():
    with pytest.raises(ShapeError, match=r"inside of given\(kind\)"), given(kind=Partition.from_sizes([2, 2])):
        Norm("b t c -> b kind[c]")(X)
