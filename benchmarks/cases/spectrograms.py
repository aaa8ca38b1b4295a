"""Spectrograms: bands of unequal width."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flexnorm import Partition, normalize

from .. import gate, handmade
from ..case import EPS, Case, Contender, Data, randn, shrunk

MEL = [5, 5, 6, 8, 10, 12, 14, 20]
LINEAR = [4, 8, 12, 20, 31, 43, 60, 79]


def _data(shape: tuple[int, int, int, int], sizes: list[int]) -> Callable[..., Data]:
    def make(scale: float, generator: torch.Generator) -> Data:
        return Data(
            x=randn(shrunk(shape, scale, (3,)), generator),
            weight=sum(sizes),
            bias=sum(sizes),
            over=(sum(sizes), 1),
            valid=None,
            sizes=sizes,
            band=Partition.from_sizes(sizes),
            share=handmade.shares(sizes),
        )

    return make


def _loop(d: Data) -> Tensor:
    """A native call for every band."""
    pieces = []
    for x, weight, bias in zip(d.x.split(d.sizes, 2), d.weight.split(d.sizes), d.bias.split(d.sizes), strict=True):
        z = F.layer_norm(x, x.shape[2:], eps=EPS)
        pieces.append(torch.addcmul(bias.view(-1, 1), z, weight.view(-1, 1)))
    return torch.cat(pieces, 2)


def _loop_into(d: Data) -> Tensor:
    y, first = torch.empty_like(d.x), 0
    for x, weight, bias in zip(d.x.split(d.sizes, 2), d.weight.split(d.sizes), d.bias.split(d.sizes), strict=True):
        there = y.narrow(2, first, x.shape[2])
        torch.addcmul(bias.view(-1, 1), F.layer_norm(x, x.shape[2:], eps=EPS), weight.view(-1, 1), out=there)
        first += x.shape[2]
    return y


def _case(shape: tuple[int, int, int, int], sizes: list[int], *, short: bool = False) -> Case:
    return Case(
        f"{len(sizes)} unequal bands {'x'.join(map(str, shape))}",
        "expression",
        _data(shape, sizes),
        lambda d: normalize(d.x, "n c f t -> n c band[f]", band=d.band, weight=d.weight, bias=d.bias, affine="f"),
        [
            Contender(
                "moments of rows, merged",
                lambda d: handmade.parts(d.x, (3,), d.share, *handmade.affine(d)),
                formula=True,
            ),
            Contender("loop of layer_norm", _loop),
            Contender("loop of layer_norm into a buffer", _loop_into, forward_only=True),
        ],
        lambda d: gate.in_parts(d.x, 2, d.sizes, (2, 3)),
        short=short,
    )


CASES = [_case((32, 4, 80, 1000), MEL, short=True), _case((16, 32, 257, 400), LINEAR)]
