"""Speech of different lengths in one batch: what padding does to GroupNorm, in a layer and in wav2vec 2.0.

Prints by how much the valid frames of a batch differ from those of every utterance alone.
"""

# %%
import wave
from pathlib import Path

import torch
import torchaudio
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from flexnorm.padding import padding_proof
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm, frame_lengths

torch.manual_seed(0)


# %% A recording, cut into utterances of 2, 1 and half a second
with wave.open(str(Path(__file__).parent / "data" / "speech.wav")) as recording:
    rate = recording.getframerate()
    bytes_ = bytearray(recording.readframes(recording.getnframes()))
speech = torch.frombuffer(bytes_, dtype=torch.int16) / 32768
lengths = torch.tensor([2 * rate, rate, rate // 2])
utterances = speech[: int(lengths.sum())].split(lengths.tolist())
waves = pad_sequence(list(utterances), batch_first=True)


def show(what, batch, alone):
    """Prints the largest difference on valid frames; both are lists of (frames, channels)."""
    off = max((a - b).abs().max().item() for a, b in zip(batch, alone, strict=True))
    print(f"  {what:<48}  {off:.1e}")


# %% One layer: frames of a convolution over the samples, 25 ms each, every 10 ms
conv = nn.Conv1d(1, 64, 400, stride=160)
with torch.no_grad():
    items = [conv(u[None, None])[0].T for u in utterances]  # (frames, channels) of every utterance alone
    frames = frame_lengths(lengths, conv)
    assert frames.tolist() == [len(item) for item in items]

    x = pad_sequence(items, batch_first=True).transpose(1, 2)  # (batch, channels, time)
    mask = torch.arange(x.shape[2]) < frames[:, None]

    def valid(y):
        return [t[:, :n].T for t, n in zip(y, frames, strict=True)]

    theirs = nn.GroupNorm(8, 64)
    alone = [theirs(item.T[None])[0].T for item in items]
    print(f"{len(items)} utterances of {frames.tolist()} frames, 64 channels: off from each alone by")
    show("nn.GroupNorm", valid(theirs(x)), alone)

    ours = SequenceGroupNorm(8, 64)
    ours.load_state_dict(theirs.state_dict())
    starts = nn.functional.pad(frames.cumsum(0), (1, 0))
    jagged = torch.nested.as_nested_tensor(items, layout=torch.jagged)
    results = {
        "lengths=frames": valid(ours(x, lengths=frames)),
        "mask, bool": valid(ours(x, mask)),
        "mask, 0 and 1 (Hugging Face)": valid(ours(x, mask.long())),
        "key_padding_mask (torch)": valid(ours(x, key_padding_mask=~mask)),
        "packed, cu_seqlens": ours(torch.cat(items), cu_seqlens=starts).split(frames.tolist()),
        "jagged NestedTensor": ours(jagged).unbind(),
    }
    for name, result in results.items():
        show(f"SequenceGroupNorm, {name}", result, alone)

    tokens = TokenGroupNorm(8, 64)
    alone = [theirs(item) for item in items]
    show("TokenGroupNorm, lengths=frames", valid(tokens(x.mT, lengths=frames).mT), alone)


# %% A whole model, as torchaudio has it: random weights, the first convolution is normalized over time
def wav2vec2():
    torch.manual_seed(0)
    return torchaudio.models.wav2vec2_model(
        extractor_mode="group_norm",
        extractor_conv_layer_config=[
            (64, 10, 5),
            (64, 3, 2),
            (64, 3, 2),
            (64, 3, 2),
            (64, 3, 2),
            (64, 2, 2),
            (64, 2, 2),
        ],
        extractor_conv_bias=False,
        encoder_embed_dim=64,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=32,
        encoder_pos_conv_groups=4,
        encoder_num_layers=2,
        encoder_num_heads=4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=128,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    ).eval()


@torch.no_grad()
def run(model, what):
    alone = [model(u[None], torch.tensor([len(u)]))[0][0] for u in utterances]
    y, n = model(waves, lengths)
    show(what, [t[:k] for t, k in zip(y, n, strict=True)], alone)
    return torch.cat(alone).abs().mean().item()


print("\nwav2vec 2.0 of torchaudio with group norm, on the same batch: off from each alone by")
run(wav2vec2(), "as it is")
size = run(padding_proof(wav2vec2()), "padding_proof(model)")
print(f"where outputs are {size:.1f} on average")
