"""`padding_proof`: real models give each utterance of a padded batch what it gets alone."""

import copy
import pickle

import pytest
import torch
import torchaudio
import transformers
from torch import nn

from flexnorm import ShapeError, SpecError, moments
from flexnorm.padding import padding_proof

pytestmark = pytest.mark.extras

# Alone and in a batch, sums are grouped differently and pass a dozen layers: some 100 roundings of float32.
CLOSE = 1e-5


def wav2vec(mode="group_norm", norm_first=False):
    return torchaudio.models.wav2vec2_model(
        extractor_mode=mode,
        extractor_conv_layer_config=[(32, 10, 5), (32, 3, 2), (32, 3, 2), (32, 2, 2)],
        extractor_conv_bias=False,
        encoder_embed_dim=32,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=2,
        encoder_num_heads=4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=norm_first,
        encoder_layer_drop=0.0,
        aux_num_out=12,
    )


def conformer(**options):
    return torchaudio.models.Conformer(16, 4, 32, 2, 7, **options)


WAVES = [torch.randn(n, generator=torch.Generator().manual_seed(n)) * (1 + n % 3) for n in (4000, 2500, 1234, 400)]
FRAMES = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) * (1 + n % 3) for n in (50, 33, 9, 1)]


def padded(items, fill):
    longest = max(map(len, items))
    rows = [torch.cat([x, torch.full((longest - len(x), *x.shape[1:]), fill)]) for x in items]
    return torch.stack(rows), torch.tensor([len(x) for x in items])


def worst(model, items, fill):
    """The largest change of a valid frame between the batch and each utterance alone."""
    batch, lengths = padded(items, fill)
    y, out = model(batch, lengths)
    change = 0.0
    for i, x in enumerate(items):
        alone, _ = model(x[None], lengths[i : i + 1])
        change = max(change, (y[i, : out[i]] - alone[0, : out[i]]).abs().max().item())
    return change


@pytest.mark.parametrize("fill", [0.0, 7.0, float("nan")])
@pytest.mark.parametrize(
    ("build", "items", "torch_changes"),
    [
        (lambda: wav2vec("group_norm"), WAVES, 0.3),
        (lambda: wav2vec("group_norm", norm_first=True), WAVES, 0.3),
        (lambda: wav2vec("layer_norm"), WAVES, 0.0),
        (lambda: conformer(use_group_norm=True), FRAMES, 0.3),
        (lambda: conformer(use_group_norm=True, convolution_first=True), FRAMES, 0.3),
        (lambda: conformer(), FRAMES, 0.03),  # in evaluation: only the convolutions look into the padding
    ],
    ids=[
        "wav2vec",
        "wav2vec_norm_first",
        "wav2vec_layer_norm",
        "conformer",
        "conformer_convolution_first",
        "conformer_bn",
    ],
)
def test_torchaudio_models(build, items, torch_changes, fill):
    model = build().eval()
    keys, printed, kind = list(model.state_dict()), repr(model), type(model)
    assert worst(model, items, 0.0) >= torch_changes
    proof = padding_proof(model)
    assert worst(model, items, fill) <= CLOSE
    assert proof is model
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert repr(model).replace("(layer_norm): _", "(layer_norm): ").replace(": _", ": ") == printed.replace(": _", ": ")
    assert padding_proof(model) is model  # and a second time


def hugging_face(**options):
    return transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(32, 32, 32),
        conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3), num_feat_extract_layers=3, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
        apply_spec_augment=False, layerdrop=0.0, vocab_size=12, **options,
    )  # fmt: skip


@pytest.mark.parametrize("fill", [0.0, float("nan")])
@pytest.mark.parametrize("kind", ["Wav2Vec2Model", "Wav2Vec2ForCTC"])
@pytest.mark.parametrize(
    "options", [{"feat_extract_norm": "group"}, {"feat_extract_norm": "group", "do_stable_layer_norm": True}]
)
def test_transformers_wav2vec2(kind, options, fill):
    torch.manual_seed(0)
    model = getattr(transformers, kind)(hugging_face(**options)).eval()

    def change(fill):
        batch, lengths = padded(WAVES, fill)
        mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
        out = model(batch, attention_mask=mask)
        y = out[0]
        assert isinstance(out, transformers.utils.ModelOutput)
        largest = 0.0
        for i, x in enumerate(WAVES):
            alone = model(x[None], attention_mask=torch.ones(1, len(x), dtype=torch.long))[0][0]
            largest = max(largest, (y[i, : len(alone)] - alone).abs().max().item())
        return largest

    keys = list(model.state_dict())
    assert change(0.0) > (0.3 if kind == "Wav2Vec2Model" else 0.1)
    padding_proof(model)
    assert change(fill) <= CLOSE
    assert list(model.state_dict()) == keys
    batch, _ = padded(WAVES[:1], 0.0)
    assert model(batch).last_hidden_state.isfinite().all() if kind == "Wav2Vec2Model" else True


def test_conformer_in_training_takes_statistics_of_valid_frames():
    """Batch norm over the valid frames of the batch: as if all of them stood in one long row."""
    model = padding_proof(conformer(dropout=0.0)).train()
    seen = {}
    norm = model.conformer_layers[0].conv_module.sequential[3]
    norm.register_forward_hook(lambda module, args, y: seen.update(x=args[0], y=y))
    batch, lengths = padded(FRAMES, float("nan"))
    batch = batch.nan_to_num(3.0)
    out, _ = model(batch, lengths)
    valid = torch.cat([seen["x"][i, :, :n] for i, n in enumerate(lengths)], 1).double()  # (channels, valid frames)
    mean, var = valid.mean(1), valid.var(1, correction=0)
    expected = (valid - mean[:, None]) / (var[:, None] + norm.eps).sqrt()
    ours = torch.cat([seen["y"][i, :, :n] for i, n in enumerate(lengths)], 1)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=CLOSE)
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * valid.var(1), rtol=1e-5, atol=0)
    more = torch.cat([batch, torch.full((4, 5, 16), 9.0)], 1)[:, :50]
    assert torch.equal(more, batch)
    poisoned = batch.clone()
    for i, n in enumerate(lengths):
        poisoned[i, n:] = float("nan")
    again, _ = padding_proof(copy.deepcopy(model))(poisoned, lengths)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(again[i, :n], out[i, :n], rtol=0, atol=CLOSE)


def test_gradients_are_those_of_the_utterances_alone():
    model = padding_proof(wav2vec()).eval()
    batch, lengths = padded(WAVES[:3], 5.0)

    def loss(y, out):
        return sum(y[i, :n].square().sum() for i, n in enumerate(out))

    loss(*model(batch, lengths)).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for x, n in zip(WAVES[:3], lengths, strict=True):
        loss(*model(x[None], n[None])).backward()
    largest = max(grad.abs().max() for grad in together.values())
    for name, p in model.named_parameters():
        if p.grad is not None:  # sums over 1000 frames; of a key's bias the gradient is 0, and all is rounding
            assert (together[name] - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-7 * largest, name


class Net(nn.Sequential):
    """Layers in a row, (batch, channels, time)."""

    def forward(self, x, lengths=None):
        return super().forward(x)


CHAINS = {
    "conv": [nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()],
    "same": [nn.Conv1d(3, 8, 5, padding="same"), nn.GroupNorm(2, 8), nn.Conv1d(8, 8, 3, padding=1, dilation=1)],
    "dilated": [nn.Conv1d(3, 8, 3, padding=2, dilation=2), nn.InstanceNorm1d(8, affine=True), nn.GELU()],
    "strided": [nn.Conv1d(3, 8, 5, stride=3, padding=2), nn.GroupNorm(1, 8), nn.Conv1d(8, 8, 3, stride=2)],
    "max_pool": [nn.Conv1d(3, 8, 3), nn.MaxPool1d(3, 2, padding=1), nn.GroupNorm(4, 8)],
    "avg_pool": [nn.Conv1d(3, 8, 3), nn.AvgPool1d(3, 2, padding=1), nn.BatchNorm1d(8)],
    "transposed": [nn.ConvTranspose1d(3, 8, 4, stride=2, padding=1, output_padding=1), nn.GroupNorm(4, 8)],
    "up_and_down": [nn.Conv1d(3, 8, 4, stride=2, padding=1), nn.GroupNorm(2, 8), nn.ConvTranspose1d(8, 4, 4, stride=2)],
    "glu": [nn.Conv1d(3, 16, 3), nn.GLU(dim=1), nn.GroupNorm(2, 8)],
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name):
    net = padding_proof(copy.deepcopy(Net(*CHAINS[name])).eval(), time_dim=2, trusted=[Net])
    items = [torch.randn(n, 3) for n in (40, 23, 11)]
    batch, lengths = padded(items, float("nan"))
    y = net(batch.transpose(1, 2), lengths)
    for i, x in enumerate(items):
        alone = net(x.t()[None])
        torch.testing.assert_close(y[i, :, : alone.shape[2]], alone[0], rtol=0, atol=CLOSE)


def test_subsampling_in_two_dimensions():
    """(batch, channels, time, frequencies), as in front-ends of speech recognition."""

    class Front(Net):
        def forward(self, x, lengths=None):
            return nn.Sequential.forward(self, x[:, None])

    layers = [nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=(2, 1))]
    layers += [nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.InstanceNorm2d(4)]
    front = padding_proof(Front(*layers).eval(), trusted=[Front])
    items = [torch.randn(n, 24) for n in (64, 41, 29)]
    batch, lengths = padded(items, float("nan"))
    y = front(batch, lengths)
    for i, x in enumerate(items):
        alone = front(x[None])
        torch.testing.assert_close(y[i, :, : alone.shape[2]], alone[0], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_padding_proof_too(travel):
    model = travel(padding_proof(conformer(use_group_norm=True).eval()))
    assert worst(model, FRAMES, 7.0) <= CLOSE


def test_weights_are_kept_and_shared_layers_stay_shared():
    norm = nn.GroupNorm(2, 8)
    net = Net(nn.Conv1d(8, 8, 3, padding=1), norm, nn.Conv1d(8, 8, 1), norm)
    parameters = dict(net.named_parameters())
    padding_proof(net, time_dim=2, trusted=[Net])
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert net[1] is net[3]
    assert isinstance(net[1], nn.GroupNorm)
    assert not net[1].weight.is_meta


def test_a_part_that_was_made_so_before():
    """The inner model follows lengths of its own, and the outer one goes on with its."""
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(hugging_face()).eval()
    padding_proof(model.wav2vec2)
    hooks = len(model.wav2vec2.encoder.pos_conv_embed.conv._forward_pre_hooks)
    padding_proof(model)
    assert len(model.wav2vec2.encoder.pos_conv_embed.conv._forward_pre_hooks) == hooks
    batch, lengths = padded(WAVES[:2], 3.0)
    mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
    y = model(batch, attention_mask=mask).logits
    alone = model(WAVES[1][None], attention_mask=torch.ones(1, 2500, dtype=torch.long)).logits
    torch.testing.assert_close(y[1, : alone.shape[1]], alone[0], rtol=0, atol=CLOSE)


def test_without_lengths_nothing_changes():
    model = wav2vec().eval()
    x = torch.randn(2, 2000)
    before, _ = model(x)
    after, _ = padding_proof(model)(x)
    torch.testing.assert_close(after, before, rtol=0, atol=CLOSE)


def test_statistics_of_a_norm_are_those_of_moments():
    net = padding_proof(Net(nn.GroupNorm(2, 4, affine=False)), time_dim=2, trusted=[Net])
    x, lengths = torch.randn(2, 4, 6), torch.tensor([6, 2])
    y = net(x, lengths)
    m = moments(x, "b (g c) t, b t -> b g", torch.arange(6) < lengths[:, None], g=2)
    mean, var = (t.repeat_interleave(2, 1)[..., None] for t in (m.mean, m.var))
    torch.testing.assert_close(y[1, :, :2], ((x - mean) / (var + 1e-5).sqrt())[1, :, :2])


class Circular(nn.Conv1d):
    """What forward computes lies in another method."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(torch.roll(x, 1, -1), weight, bias)


class Called(nn.Identity):
    def __call__(self, x):
        return x.flip(-1)


class OfMyOwn(nn.GroupNorm):
    def more(self):
        return 1


def patched(module):
    module.forward = lambda x: x.flip(-1)
    return module


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([nn.LSTM(3, 3)], "0: torch.nn.modules.rnn.LSTM; its class is not known"),
        ([nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular")], "its padding is 'circular' and not zeros"),
        ([nn.Upsample(scale_factor=2)], "Upsample; its class is not known"),
        ([nn.AdaptiveAvgPool1d(1)], "AdaptiveAvgPool1d; its class is not known"),
        ([nn.AvgPool1d(3, padding=1, count_include_pad=False)], "its divisor depends on the end"),
        ([nn.MaxPool1d(3, ceil_mode=True)], "ceil_mode"),
        ([nn.LayerNorm((3, 10))], "several axes"),
        ([nn.MaxPool1d(2, return_indices=True)], "indices"),
        ([Circular(3, 3, 3, padding=1)], "Circular; its class is not known"),
        ([Called()], "Called; its class is not known"),
        ([patched(nn.Identity())], "Identity; its class is not known"),
        ([OfMyOwn(1, 3)], "lose what it adds"),
        ([nn.utils.parametrizations.weight_norm(nn.GroupNorm(1, 3), dim=0)], "lose what it adds"),
        ([nn.InstanceNorm1d(3, track_running_stats=True)], "average over sequences"),
        ([nn.Conv1d(3, 4, 1), nn.Sequential(nn.Softmax(dim=-1))], "1.0: torch.nn.modules.activation.Softmax"),
    ],
)
def test_a_layer_that_is_not_known_is_named_and_nothing_is_changed(layers, text):
    net = Net(nn.GroupNorm(1, 3), *layers) if text[0] not in "01" else Net(*layers)
    with pytest.raises(SpecError, match="may mix time") as caught:
        padding_proof(net, time_dim=2, trusted=[Net])
    assert text in str(caught.value)
    assert "trusted=[" in str(caught.value)
    assert all(type(module) in (type(layer) for layer in net.modules()) for module in net.modules())
    assert not net._forward_pre_hooks


def test_a_container_that_is_not_known_is_named():
    with pytest.raises(SpecError, match=r"trusted=\[Net\]"):
        padding_proof(Net(nn.Conv1d(3, 3, 3)))


def test_a_forward_without_lengths_is_refused():
    with pytest.raises(SpecError, match=r"Sequential.forward\(input\)"):
        padding_proof(nn.Sequential(nn.Conv1d(3, 3, 3)))


def test_bad_lengths():
    net = padding_proof(Net(nn.Conv1d(3, 4, 3), nn.GroupNorm(1, 4)), time_dim=2, trusted=[Net])
    x = torch.randn(2, 3, 10)
    with pytest.raises(ShapeError):
        net(x, torch.tensor([10, 11]))
    with pytest.raises(ShapeError):
        net(x, torch.tensor([10]))
    net(x)  # and the failed calls left nothing behind
    model = padding_proof(transformers.Wav2Vec2Model(hugging_face()).eval())
    mask = torch.ones(1, 2000, dtype=torch.long)
    mask[0, :500] = 0
    with pytest.raises(ShapeError, match="padding stands behind"):
        model(torch.randn(1, 2000), attention_mask=mask)


def test_time_that_is_cut_between_layers_is_an_error():
    class Cutting(Net):
        def forward(self, x, lengths=None):
            return self[1](self[0](x)[..., 2:])

    net = padding_proof(Cutting(nn.Conv1d(3, 4, 3), nn.GroupNorm(1, 4)), time_dim=2, trusted=[Cutting])
    with pytest.raises(ShapeError, match=r"1: .* sees 6 steps, .*; known: 10, 8"):
        net(torch.randn(2, 3, 10), torch.tensor([10, 5]))


def test_time_dim_that_is_not_that_of_the_layers_is_an_error():
    net = padding_proof(Net(nn.Conv1d(3, 4, 3)), trusted=[Net])  # time_dim=1 of (batch, channels, time)
    with pytest.raises(ShapeError, match="time_dim="):
        net(torch.randn(2, 3, 10), torch.tensor([3, 2]))


def test_recomputation_without_lengths_raises():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x, lengths=None):
            return checkpoint(super().forward, x, use_reentrant=False)

    net = padding_proof(Checkpointed(nn.Conv1d(3, 4, 3), nn.GroupNorm(1, 4)), time_dim=2, trusted=[Checkpointed])
    y = net(torch.randn(2, 3, 10, requires_grad=True), torch.tensor([10, 5]))
    with pytest.raises(RuntimeError, match="the lengths are gone"):
        y.sum().backward()


# --- what a review found ---


class Attending(nn.Module):
    """Pooling, then attention: what the pool leaves behind the end reaches the values of attention."""

    def __init__(self, tell=True):
        super().__init__()
        self.pool, self.attention, self.out = (
            nn.MaxPool1d(2),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
        )
        self.tell = tell

    def forward(self, x, lengths=None):
        x = self.pool(x).transpose(1, 2)
        mask = None
        if lengths is not None and self.tell:
            mask = torch.arange(x.shape[1]) >= (lengths // 2)[:, None]
        return self.out(self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0])


def test_pooling_leaves_nothing_behind_the_end():
    net = padding_proof(Attending().eval(), time_dim=2, trusted=Attending)
    items = [torch.randn(n, 4) for n in (20, 11)]
    batch, lengths = padded(items, float("nan"))
    y = net(batch.transpose(1, 2), lengths)
    alone = net(items[1].t()[None])
    torch.testing.assert_close(y[1, :5], alone[0], rtol=0, atol=CLOSE)
    (y[0].sum() + y[1, :5].sum()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_attention_that_is_told_nothing_is_an_error():
    net = padding_proof(Attending(tell=False), time_dim=2, trusted=[Attending])
    with pytest.raises(SpecError, match="without key_padding_mask"):
        net(torch.randn(2, 4, 20), torch.tensor([20, 11]))
    net(torch.randn(2, 4, 20), torch.tensor([20, 20]))


def test_one_size_of_two_lengths_is_an_error():
    class Forked(Net):
        def forward(self, x, lengths=None):
            y = self[0](x)
            self[1](x)
            return self[2](y)

    net = padding_proof(
        Forked(nn.Conv1d(4, 4, 1, stride=2), nn.Conv1d(4, 4, 2, stride=2), nn.GroupNorm(2, 4)),
        time_dim=2,
        trusted=[Forked],
    )
    x = torch.randn(2, 4, 10)
    with pytest.raises(ShapeError, match="of different lengths"):
        net(x, torch.tensor([10, 7]))  # 4 and 3 of the shorter one, 5 of both of the longer
    net(x, torch.tensor([10, 8]))


@pytest.mark.parametrize(
    "layer", [nn.GLU(dim=-1), nn.Linear(10, 10), nn.LayerNorm(10)], ids=["glu", "linear", "layer_norm"]
)
def test_a_layer_of_one_axis_that_is_time_is_an_error(layer):
    net = padding_proof(Net(layer), time_dim=2, trusted=[Net])
    with pytest.raises(SpecError, match="time is axis 2"):
        net(torch.randn(2, 3, 10), torch.tensor([10, 7]))


def test_batch_norm_of_flattened_steps_is_an_error():
    class Flat(Net):
        def forward(self, x, lengths=None):
            return self[0](x.reshape(-1, x.shape[-1]))

    net = padding_proof(Flat(nn.BatchNorm1d(4)), trusted=[Flat])
    with pytest.raises(ShapeError, match="sees 20 rows"):
        net(torch.randn(2, 10, 4), torch.tensor([10, 7]))


@pytest.mark.parametrize("tell", [True, False])
def test_a_part_called_with_or_without_lengths(tell):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = padding_proof(Net(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4)), time_dim=2, trusted=[Net])
            self.norm = nn.GroupNorm(1, 4)

        def forward(self, x, lengths=None):
            return self.norm(self.part(x, lengths) if tell else self.part(x))

    net = padding_proof(Outer(), time_dim=2, trusted=[Outer, Net])
    items = [torch.randn(n, 3) for n in (20, 11)]
    batch, lengths = padded(items, float("nan"))
    y, alone = net(batch.transpose(1, 2), lengths), net(items[1].t()[None])
    torch.testing.assert_close(y[1, :, :9], alone[0], rtol=0, atol=CLOSE)


def test_ids_and_inputs_by_keyword():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv, self.norm = nn.Embedding(9, 4), nn.Conv1d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)

        def forward(self, ids=None, attention_mask=None, embedded=None):
            x = self.embed(ids) if embedded is None else embedded
            return self.norm(input=self.conv(input=x.transpose(1, 2)))

    net = padding_proof(Words(), trusted=[Words])
    ids, mask = torch.randint(0, 9, (2, 7)), torch.arange(7) < torch.tensor([[7], [4]])
    alone = net(ids[1:, :4])
    for y in (
        net(ids, mask),
        net(ids=ids, attention_mask=mask.long()),
        net(attention_mask=mask, embedded=net.embed(ids)),
    ):
        torch.testing.assert_close(y[1, :, :4], alone[0], rtol=0, atol=CLOSE)


def test_both_ways_of_saying_what_is_valid():
    class Both(Net):
        def forward(self, x, lengths=None, attention_mask=None):
            return nn.Sequential.forward(self, x)

    net = padding_proof(Both(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4)), time_dim=2, trusted=[Both])
    x, lengths = torch.randn(2, 3, 10), torch.tensor([10, 6])
    mask = torch.arange(10) < lengths[:, None]
    assert torch.equal(net(x, lengths), net(x, attention_mask=mask))
    with pytest.raises(SpecError, match="not both"):
        net(x, lengths, mask)


def test_output_size_of_a_transposed_convolution_is_an_error():
    class Sized(Net):
        def forward(self, x, lengths=None):
            return self[0](x, output_size=[20])

    net = padding_proof(Sized(nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1)), time_dim=2, trusted=[Sized])
    with pytest.raises(ShapeError, match="output_size"):
        net(torch.randn(2, 3, 10), torch.tensor([10, 6]))


def test_layers_added_later_are_found_by_a_second_call():
    net = padding_proof(Net(nn.Conv1d(3, 4, 3)), time_dim=2, trusted=[Net])
    net.append(nn.GroupNorm(2, 4))
    padding_proof(net, time_dim=2, trusted=[Net])
    x, lengths = torch.randn(2, 3, 10), torch.tensor([10, 6])
    torch.testing.assert_close(net(x, lengths)[1, :, :4], net(x[1:, :, :6])[0], rtol=0, atol=CLOSE)
    assert len(net._forward_pre_hooks) == 1


def test_a_batch_folded_into_another_is_an_error():
    class Folded(Net):
        def forward(self, x, lengths=None):
            return self[0](x.reshape(4, 2, 10))

    net = padding_proof(Folded(nn.Conv1d(2, 4, 3)), time_dim=2, trusted=[Folded])
    with pytest.raises(ShapeError, match="the sequences of the batch, 2"):
        net(torch.randn(2, 4, 10), torch.tensor([10, 6]))
