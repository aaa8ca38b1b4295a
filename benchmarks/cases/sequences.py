"""Sequences: tokens, padded utterances, packed documents."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flexnorm import Partition, normalize

from .. import gate, handmade
from ..case import EPS, Case, Contender, Data, fill, randn, shrunk

# --- tokens, each a set of its own -----------------------------------------------------------------------------------


def lengths(n: int, longest: int, generator: torch.Generator) -> Tensor:
    """From a fifth to all of the longest."""
    drawn = (longest * (0.2 + 0.8 * torch.rand(n, generator=generator))).round().long().clamp(1, longest)
    drawn[0] = longest
    return drawn


def _tokens(shape: tuple[int, int, int], *, masked: bool, bias: bool = True) -> Callable[..., Data]:
    def make(scale: float, generator: torch.Generator) -> Data:
        x = randn(shrunk(shape, scale, (1,)), generator)
        b, t, c = x.shape
        made = Data(x=x, weight=c, bias=c if bias else None, over=(c,), valid=None, groups=32)
        if masked:
            made.mask = torch.arange(t) < lengths(b, t, generator).unsqueeze(1)
            made.valid, made.outside = made.mask.unsqueeze(2), ~made.mask.unsqueeze(2)
            made.kept = made.mask.flatten().nonzero().squeeze(1)
        return made

    return make


def _by_group_norm(d: Data) -> Tensor:
    return F.group_norm(d.x.view(-1, d.x.shape[-1]), d.groups, d.weight, d.bias, EPS).view_as(d.x)


def _by_layer_norm(d: Data) -> Tensor:
    b, t, c = d.x.shape
    v = d.x.view(b, t, d.groups, c // d.groups)
    return torch.addcmul(d.bias, F.layer_norm(v, v.shape[-1:], eps=EPS).view_as(d.x), d.weight)


def _by_var_mean(d: Data) -> Tensor:
    b, t, c = d.x.shape
    v = d.x.view(b, t, d.groups, c // d.groups)
    return handmade.pooled(v, (3,), d.weight.view(d.groups, -1), d.bias.view(d.groups, -1)).view_as(d.x)


def _packed_first(d: Data, call: Callable[[Data], Tensor]) -> Tensor:
    """Valid tokens only, gathered and put back."""
    rows = d.x.view(-1, d.x.shape[-1])
    inner = Data(**{**vars(d), "x": rows.index_select(0, d.kept).unsqueeze(0)})
    return torch.zeros_like(rows).index_copy(0, d.kept, call(inner).squeeze(0)).view_as(d.x)


def _token_reference(d: Data) -> tuple[Tensor, Tensor]:
    b, t, c = d.x.shape
    z, ratio = gate.pooled(d.x.view(b, t, d.groups, c // d.groups), (3,))
    z, ratio = z.reshape(d.x.shape), ratio.expand_as(z).reshape(d.x.shape)
    return (z, ratio) if d.valid is None else (torch.where(d.valid, z, 0.0), ratio)


def _token_case(shape: tuple[int, int, int], *, short: bool = False) -> Case:
    def outside_zero(call: Callable[[Data], Tensor]) -> Callable[[Data], Tensor]:
        return lambda d: call(d).masked_fill_(d.outside, 0.0)

    return Case(
        f"masked tokens, group norm {'x'.join(map(str, shape))}",
        "expression",
        _tokens(shape, masked=True),
        lambda d: normalize(
            d.x, "b t (g c), b t -> b t g", d.mask, g=d.groups, weight=d.weight, bias=d.bias, affine="(g c)"
        ),
        [
            Contender("group_norm, masked_fill_", outside_zero(_by_group_norm)),
            Contender("layer_norm of groups, masked_fill_", outside_zero(_by_layer_norm)),
            Contender("group_norm of the valid", lambda d: _packed_first(d, _by_group_norm)),
            Contender("layer_norm of the valid's groups", lambda d: _packed_first(d, _by_layer_norm)),
            Contender("var_mean, where", lambda d: torch.where(d.valid, _by_var_mean(d), 0.0), formula=True),
        ],
        _token_reference,
        short=short,
    )


def _unmasked_token_case(shape: tuple[int, int, int]) -> Case:
    return Case(
        f"tokens, group norm {'x'.join(map(str, shape))}",
        "native",
        _tokens(shape, masked=False),
        lambda d: normalize(d.x, "b t (g c) -> b t g", g=d.groups, weight=d.weight, bias=d.bias, affine="(g c)"),
        [
            Contender("torch group_norm", _by_group_norm),
            Contender("torch layer_norm of groups", _by_layer_norm),
            Contender("var_mean", _by_var_mean, formula=True),
        ],
        _token_reference,
    )


def _layer_case(shape: tuple[int, int, int], *, table: str = "torch", short: bool = False) -> Case:
    return Case(
        f"layer norm {'x'.join(map(str, shape))}",
        "native",
        _tokens(shape, masked=False),
        lambda d: normalize(d.x, "... c -> ...", weight=d.weight, bias=d.bias, affine="c"),
        [
            Contender(
                "torch layer_norm", lambda d: F.layer_norm(d.x, d.x.shape[-1:], d.weight, d.bias, EPS), formula=True
            )
        ],
        lambda d: gate.pooled(d.x, (2,)),
        table=table,
        short=short,
        fused="layer_norm",
    )


def _rms_case(shape: tuple[int, int, int], *, table: str = "torch") -> Case:
    def formula(d: Data) -> Tensor:
        return d.x * torch.rsqrt(d.x.square().mean(-1, keepdim=True) + EPS) * d.weight

    return Case(
        f"rms norm {'x'.join(map(str, shape))}",
        "native",
        _tokens(shape, masked=False, bias=False),
        lambda d: normalize(d.x, "... c -> ...", center=False, weight=d.weight, affine="c"),
        [
            Contender("torch rms_norm", lambda d: F.rms_norm(d.x, d.x.shape[-1:], d.weight, EPS)),
            Contender("mean of squares", formula, formula=True),
        ],
        lambda d: gate.pooled(d.x, (2,), center=False),
        table=table,
        fused="rms_norm",
    )


# --- padded utterances -----------------------------------------------------------------------------------------------


def _utterances(groups: int) -> Callable[..., Data]:
    def make(scale: float, generator: torch.Generator) -> Data:
        x = randn(shrunk((8, 512, 15999), scale, (2,)), generator)
        b, c, t = x.shape
        lens = lengths(b, t, generator)
        mask = torch.arange(t) < lens.unsqueeze(1)
        return Data(
            x=x,
            weight=c,
            bias=c,
            over=(c, 1),
            valid=mask.unsqueeze(1),
            mask=mask,
            lens=lens.tolist(),
            count=lens.view(-1, 1, 1, 1) * (c // groups),
            groups=groups,
        )

    return make


def _utterance_formula(d: Data) -> Tensor:
    b, c, t = d.x.shape
    g = d.groups
    v, weight, bias = d.x.view(b, g, c // g, t), d.weight.view(g, -1, 1), d.bias.view(g, -1, 1)
    return handmade.masked(v, d.mask.view(b, 1, 1, t), (2, 3), d.count, weight, bias).view_as(d.x)


def _utterance_pieces(d: Data) -> list[Tensor]:
    return [F.group_norm(x[None, :, :n], d.groups, d.weight, d.bias, EPS) for x, n in zip(d.x, d.lens, strict=True)]


def _utterance_loop(d: Data) -> Tensor:
    t = d.x.shape[-1]
    return torch.cat([F.pad(piece, (0, t - piece.shape[-1])) for piece in _utterance_pieces(d)])


def _utterance_into(d: Data) -> Tensor:
    y = torch.empty_like(d.x)
    for i, piece in enumerate(_utterance_pieces(d)):
        y[i, :, : piece.shape[-1]] = piece[0]
        y[i, :, piece.shape[-1] :] = 0
    return y


def _utterance_reference(d: Data) -> tuple[Tensor, Tensor]:
    b, c, t = d.x.shape
    z, ratio = gate.pooled(d.x.view(b, d.groups, c // d.groups, t), (2, 3), d.mask.view(b, 1, 1, t))
    return torch.where(d.valid, z.view_as(d.x), 0.0), ratio.expand_as(z).reshape(d.x.shape)


def _utterance_case(groups: int, *, short: bool = False) -> Case:
    return Case(
        f"masked utterances, {groups} groups 8x512x15999",
        "expression",
        _utterances(groups),
        lambda d: normalize(
            d.x, "b (g c) t, b t -> b g", d.mask, g=d.groups, weight=d.weight, bias=d.bias, affine="(g c)"
        ),
        [
            Contender("where, two passes", _utterance_formula, formula=True),
            Contender("loop of group_norm, pad, cat", _utterance_loop),
            Contender("loop of group_norm into a buffer", _utterance_into, forward_only=True),
        ],
        _utterance_reference,
        short=short,
    )


# --- packed documents ------------------------------------------------------------------------------------------------


def _documents(scale: float, generator: torch.Generator) -> Data:
    total = max(8, round(16384 * scale))
    sizes = fill(total, lambda: math.exp(5.5 + torch.randn((), generator=generator).item()))
    doc = Partition.from_sizes(sizes)
    return Data(
        x=randn((total, 1024), generator),
        weight=1024,
        bias=1024,
        over=(1024,),
        valid=None,
        groups=32,
        doc=doc,
        ids=doc.ids,
        count=doc.count,
        sizes=sizes,
        sizes_of_sets=doc.counts.float(),
        member=F.one_hot(doc.ids, doc.count).float().t().contiguous(),
    )


def _document_case() -> Case:
    def reference(d: Data) -> tuple[Tensor, Tensor]:
        z, ratio = gate.labelled(d.x.view(d.x.shape[0], d.groups, -1), d.ids, d.count)
        return z.view_as(d.x), ratio.expand_as(z).reshape(d.x.shape)

    return Case(
        "packed documents, group norm 16384x1024",
        "expression",
        _documents,
        lambda d: normalize(
            d.x, "t (g c) -> doc[t] g", doc=d.doc, g=d.groups, weight=d.weight, bias=d.bias, affine="(g c)"
        ),
        [
            Contender("index_add", handmade.index_add, formula=True),
            Contender("scatter_reduce", handmade.scatter_reduce),
            Contender("loop of var_mean", handmade.loop),
            Contender("product with one-hot labels", handmade.one_hot),
        ],
        reference,
        short=True,
    )


CASES = [
    _layer_case((2, 16, 128), short=True),
    _layer_case((6, 100, 384), short=True),
    _layer_case((16, 160, 768)),
    _layer_case((24, 512, 1024), short=True),
    _rms_case((24, 512, 1024)),
    _layer_case((32, 512, 768), table="peers"),
    _rms_case((32, 512, 768), table="peers"),
    _unmasked_token_case((32, 512, 768)),
    _token_case((32, 512, 768), short=True),
    _token_case((8, 1024, 1024)),
    _utterance_case(512),
    _utterance_case(32, short=True),
    _document_case(),
]
