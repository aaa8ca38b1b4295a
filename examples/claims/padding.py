"""Utterances padded with zeros, noise and NaN, by little and by much: what it does to the valid frames."""

import torch
from claim import FAILS, HOLDS, IN_PART, Claim, tell
from torch import nn

from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm

torch.manual_seed(0)
LENGTHS, C, G = [60, 37, 12], 16, 4
valid = [3 + 2 * torch.randn(n, C) for n in LENGTHS]
slopes = [torch.randn(n, C) for n in LENGTHS]  # dy; that of padding is 0, as that of a masked loss
WEIGHT, BIAS = 1 + 0.3 * torch.randn(C), torch.randn(C)
PADDING = {
    "zeros": lambda t, total: t.new_zeros(total - len(t), C),
    "noise of 100": lambda t, total: 100 * torch.randn(total - len(t), C),
    "NaN": lambda t, total: t.new_full((total - len(t), C), torch.nan),
}


class OverTime(nn.GroupNorm):
    """torch's, for (batch, time, channels)."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class PerFrame(nn.GroupNorm):
    """torch's, of every frame alone."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


def run(norm, x, dy, **told):
    with torch.no_grad():
        norm.weight.copy_(WEIGHT)
        norm.bias.copy_(BIAS)
    norm.zero_grad()
    x = x.requires_grad_()
    y = norm(x, **told)
    y.backward(dy)
    return y.detach(), x.grad, torch.stack([norm.weight.grad, norm.bias.grad])


def alone(norm):
    """Valid outputs, their input gradients, those of weight and bias: of every utterance by itself, in float64."""
    parts = [run(norm.double(), t[None].double(), dy[None].double()) for t, dy in zip(valid, slopes, strict=True)]
    return torch.cat([y[0] for y, _, _ in parts]), torch.cat([dx[0] for _, dx, _ in parts]), sum(p for *_, p in parts)


def together(norm, content, total, **told):
    """The same of a padded batch, and the outputs at padding."""
    x = torch.stack([torch.cat([t, PADDING[content](t, total)]) for t in valid])
    dy = torch.stack([torch.cat([t, t.new_zeros(total - len(t), C)]) for t in slopes])
    y, dx, params = run(norm, x, dy, **told)
    inside = torch.arange(total) < torch.tensor(LENGTHS)[:, None]
    return y[inside], dx[inside], params, y[~inside]


def largest(t):
    return t.abs().max().item()  # NaN, where there is one


def shown(error):
    return "NaN" if error != error else f"{error:.0e}" if error > ROUNDING else "< 1e-4" if error else "0"


# float32 against float64: a sum of 109 frames, each wrong by some 5 units of 6e-8
ROUNDING = 1e-4
told = {"lengths": LENGTHS}
norms = {
    "over time, torch's": (OverTime(G, C), OverTime(G, C), {}),
    "over time, lengths told": (SequenceGroupNorm(G, C, channels_last=True), OverTime(G, C), told),
    "per frame, nothing told": (TokenGroupNorm(G, C), PerFrame(G, C), {}),
    "per frame, lengths told": (TokenGroupNorm(G, C), PerFrame(G, C), told),
}
rows, untouched = [], {}
for name, (norm, peer, arguments) in norms.items():
    truth, first = alone(peer), together(norm, "zeros", 61, **arguments)
    untouched[name] = torch.ones(4, dtype=torch.bool)  # valid outputs, their gradients, those of parameters, padding
    for content in PADDING:
        same = True
        for total in (61, 400):
            found = together(norm, content, total, **arguments)
            equal = [torch.equal(a, b) for a, b in zip(found[:3], first, strict=False)]
            errors = [largest(a - b) for a, b in zip(found[:3], truth, strict=True)]
            good = [e <= ROUNDING and same for e, same in zip(errors, equal, strict=True)]
            untouched[name] &= torch.tensor([*good, largest(found[3]) == 0])
            same = same and all(equal)
        rows.append((name, content, *map(shown, errors), "yes" if same else "no", shown(largest(found[3]))))

masked = all(untouched[name].all() for name in norms if "lengths" in name)
values, gradients, parameters, _ = untouched["per frame, nothing told"].tolist()
pooled = untouched["over time, torch's"].any().item()
whole = HOLDS if parameters and pooled else IN_PART

tell(
    Claim(
        title="Padding has no effect",
        says="Group norm, applied per token, is naturally compatible with padded sequences: padding has no effect "
        "on what is computed for the valid tokens. With a mask, padding has no effect at all.",
        source="told of group norm in sequence models; the second sentence is a promise of this library",
        expected="Utterances of 60, 37 and 12 frames, padded to 61 and to 400, against torch's norm of every "
        "utterance alone, in float64. Per frame, no valid output knows of padding, mask or not. Over time, padding "
        "counts as long as nobody says that it is padding. Told the lengths, both must be bit-identical for any "
        "padding, in values, input gradients and those of weight and bias, and 0 at padding.",
        columns=(
            "group norm",
            "340 frames and more of",
            "valid outputs",
            "input gradients",
            "of weight, bias",
            "same bits",
            "at padding",
        ),
        rows=rows,
        verdict=whole if masked and values and gradients else FAILS,
        because="Told the lengths, padding changes no bit. Per frame and without a mask, the claim holds as it is "
        "told, of zeros, and valid outputs and their gradients are free of any padding; but NaN in padding gets "
        "into the gradients of weight and bias although the loss does not look at it, and the padding itself leaves "
        "the norm as bias or as noise, which the next layer over time mixes with the rest. Where statistics pool "
        "time, the claim is false: even zeros change everything.",
    )
)
