"""Calls that end in an error, or look as if they might: name -> call. The golden file has the outcome of each.

The full texts in `test_errors.py` stand there. Together both files reach nearly every `raise` of the core:
`python tests/golden/make.py --missed` lists the others.
"""

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from flexnorm import Moments, Norm, Partition, calibrate, given, moments, normalize
from flexnorm.conversion import SyncBatchNorm, convert_sync_batchnorm
from flexnorm.grouping import SoftGroupNorm, cluster_channels, correlate_channels, groups_by_depth, regroup, signatures
from flexnorm.images import ChannelGroupNorm, default_groups
from flexnorm.mixtures import ContextGate, ContextNorm, DualNorm, LearnedGate, Mixture, SwitchableNorm
from flexnorm.presets import (
    DemographicNorm,
    RegionNorm,
    SensorNorm,
    SpectralGroupNorm,
    SubgraphNorm,
    TemporalGroupNorm,
    WeightedGroupNorm,
)
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm, as_mask, frame_lengths
from flexnorm.spec import Spec
from flexnorm.spectrograms import CepstralNorm, MelBandNorm, hz_bands, mel_bands
from flexnorm.successors import ChannelAffine
from flexnorm.transition import Transition, advance, finish

Cases = dict[str, Callable[[], Any]]

x = torch.zeros(4, 32, 8)
ids = torch.arange(32)
valid = torch.ones(4, 8, dtype=torch.bool)
image = torch.zeros(2, 6, 4, 5)
pixels = torch.ones(2, 4, 5, dtype=torch.bool)
rows = torch.zeros(5, 6)
graph = torch.tensor([0, 0, 1, 1, 1])
spectrogram = torch.zeros(2, 6, 7)
KIND = torch.tensor([0, 1, 1, 0, 2, 2])


class _Cases(dict[str, Callable[[], Any]]):
    """Each name once."""

    def __ior__(self, others: Any) -> "_Cases":
        assert not self.keys() & others.keys(), self.keys() & others.keys()
        self.update(others)
        return self


CASES: Cases = _Cases()


def quiet(make: Callable[[], Any]) -> Any:
    """What is made, without torch's warnings that a feature is new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def nested(layout: torch.layout) -> torch.Tensor:
    return quiet(lambda: torch.nested.nested_tensor([torch.zeros(3, 6), torch.zeros(2, 6)], layout=layout))


@contextmanager
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def patterns(*texts: str) -> Cases:
    return {f"pattern {text!r}": lambda text=text: normalize(torch.zeros(2, 2), text) for text in texts}


CASES |= patterns(
    "", " ", "->", "n c ->", "-> n", "n c -> n]", "n c -> n, c", "n c, n -> n, c", "n c, n, c -> n", "n [c] -> n",
    "n c -> kind[c c]", "n c, kind[c] -> n", "n c, d -> n", "n c, ... -> n", "n c, 3 -> n", "n c, n n -> n",
    "n ... ... -> n", "n c -> c c", "n (c -> n)", "n (g (c)) -> n", "n c -> (n c", "n c -> kind[(c)]",
    "n c -> kind[c", "n c -> 2n", "2n c -> c", "n_ c -> c", "n __ -> n", "n 1.5 -> n", "n c = 2 -> n", "n * -> n",
    "n; c -> n", "n - c -> n", "n > c", "n {g c} -> n", "n … -> n", "n c → n", "n .. -> n", "n/c -> n", "n 00 -> n",
    "n 1234567890123456789 -> n", "n c -> kind[d]", "n c -> kind[...]", "n c -> kind[n] kind[n]", "n c -> n[c]",
    "n c -> k[n] n k[n c]", "n (c 2) -> n 2", "n chan -> chna", "n c, cn -> n", "n c -> n ...", "n (c ...) -> c",
    "n c -> _k[n]", "n 1 -> n 1", "n c -> () n", "n (c) -> c",
)  # fmt: skip

# --- x ---------------------------------------------------------------------------------------------------------------

EVERY = {
    "a list": lambda: [1.0, 2.0],
    "None": lambda: None,
    "a numpy array": lambda: x.numpy(),
    "int64": lambda: x.long(),
    "uint8": lambda: x.to(torch.uint8),
    "bool": lambda: x.bool(),
    "float8": lambda: x.to(torch.float8_e4m3fn),
    "float16": lambda: x.half(),
    "bfloat16": lambda: x.bfloat16(),
    "float64": lambda: x.double(),
    "complex64": lambda: x.to(torch.complex64),
    "complex128": lambda: x.to(torch.complex128),
    "a conjugate": lambda: x.to(torch.complex64).conj(),
    "a negative view": lambda: torch.zeros(4, 32, 8, dtype=torch.complex64).conj().imag,
    "meta": lambda: x.to("meta"),
    "sparse": lambda: x.to_sparse(),
    "sparse_csr": lambda: quiet(lambda: x[0].to_sparse_csr()),
    "nested, strided": lambda: nested(torch.strided),
    "nested, jagged": lambda: nested(torch.jagged),
    "a Parameter": lambda: nn.Parameter(x),
    "expanded": lambda: torch.zeros(1, 32, 1).expand(4, 32, 8),
    "no batch": lambda: x[:0],
    "no channels": lambda: x[:, :0],
    "no time": lambda: x[:, :, :0],
    "a scalar": lambda: torch.tensor(1.0),
    "one axis": lambda: x[0, 0],
    "four axes": lambda: x[None],
    "NaN": lambda: torch.full((4, 32, 8), math.nan),
    "Inf": lambda: torch.full((4, 32, 8), math.inf),
}
for name, make in EVERY.items():
    CASES |= {
        f"normalize, x: {name}": lambda make=make: normalize(make(), "n (g c) t -> n g", g=4),
        f"normalize, mask, x: {name}": lambda make=make: normalize(make(), "n c t, n t -> n", valid),
        f"Norm, running, x: {name}": lambda make=make: Norm("n c t -> c", c=32, track_running_stats=True)(make()),
        f"ChannelGroupNorm, x: {name}": lambda make=make: ChannelGroupNorm(4, 32)(make()),
        f"SequenceGroupNorm, x: {name}": lambda make=make: SequenceGroupNorm(4, 32)(make()),
    }
CASES |= {
    "normalize, one value for each set": lambda: normalize(torch.ones(3, 2), "n c -> n c"),
    "normalize, a scalar, no axis": lambda: normalize(torch.tensor(3.0), "->"),
    "normalize, einops' unit axis": lambda: normalize(torch.zeros(3, 1), "n 1 -> n"),
    "normalize, no axis and x has one": lambda: normalize(torch.zeros(3), "->"),
    "normalize, unit axis of size 2": lambda: normalize(torch.zeros(3, 2), "n () -> n"),
    "normalize, ellipsis of no axis": lambda: normalize(torch.zeros(3, 2), "n c ... -> n"),
    "normalize, ellipsis and too few axes": lambda: normalize(torch.zeros(3), "n c ... -> n"),
    "normalize, too many axes": lambda: normalize(torch.zeros(3, 2, 2, 2), "n c -> n"),
}

# --- names and sizes -------------------------------------------------------------------------------------------------

CASES |= {
    "sizes: a list": lambda: normalize(x, "n c t -> n", sizes=[("c", 32)]),
    "sizes: a key that is no string": lambda: normalize(x, "n c t -> n", sizes={3: 32}),
    "sizes: an unknown axis": lambda: normalize(x, "n c t -> n", sizes={"d": 3}),
    "sizes: an unknown axis of a pattern without names": lambda: normalize(x, "... -> ...", sizes={"d": 3}),
    "sizes: a composition in another order": lambda: normalize(x, "n (g c) t -> n g", sizes={"(c g)": 32}, g=4),
    "sizes: text that is no pattern": lambda: normalize(x, "n (g c) t -> n g", sizes={"(g": 32}, g=4),
    "sizes: two axes": lambda: normalize(x, "n (g c) t -> n g", sizes={"n t": 32}, g=4),
    "sizes: a composition that does not divide": lambda: normalize(x, "n (g c) t -> n g", sizes={"(g c)": 33}, g=4),
    "sizes: a composition of another size": lambda: normalize(x, "n (g c) t -> n g", sizes={"(g c)": 36}, g=4),
    "sizes: a composition of unknown axes": lambda: normalize(x, "n (g c) t -> n g", sizes={"(g c)": 32}),
    "sizes: a composition and all of its axes": lambda: normalize(
        x, "n (g c) t -> n g", sizes={"(g c)": 32, "g": 4, "c": 4}
    ),
    "sizes: an axis of size 0": lambda: normalize(x, "n (g c) t -> n g", g=0),
    "sizes: an axis of size 0 of nothing": lambda: normalize(x[:, :0], "n (g c) t -> n g", g=0),
    "sizes: unknown axes of nothing": lambda: normalize(x[:, :0], "n (g c) t -> n g"),
    "sizes: three axes of a composition": lambda: normalize(x, "n (a b c) t -> n a", a=2),
    "sizes: a composition with a number": lambda: normalize(x, "n (g 5) t -> n g"),
    "sizes: a bool": lambda: normalize(x, "n (g c) t -> n g", g=True),
    "sizes: a string": lambda: normalize(x, "n (g c) t -> n g", g="4"),
    "sizes: None": lambda: normalize(x, "n (g c) t -> n g", g=None),
    "sizes: a tensor": lambda: normalize(x, "n (g c) t -> n g", g=torch.tensor(4)),
    "sizes: a tensor of two": lambda: normalize(x, "n (g c) t -> n g", g=torch.tensor([4, 4])),
    "sizes: a Partition for an axis": lambda: normalize(x, "n c t -> n", c=Partition(ids)),
    "sizes: an axis that is an option": lambda: normalize(x, "n (scale c) t -> n scale", sizes={"scale": -4}),
    "sizes: a size of an axis of the ellipsis": lambda: normalize(x, "n ... -> n", sizes={"...": 3}),
    "sizes: many divisors": lambda: normalize(torch.zeros(1, 720720), "n (g c) -> n g"),
    "names: near an axis": lambda: normalize(x, "n channels t -> n", chanels=32),
    "names: near a label": lambda: normalize(x, "n c t -> n region[c]", regoin=ids),
    "names: an option of Norm": lambda: normalize(x, "n c t -> n", momentum=0.1),
    "names: an unknown name of a layer": lambda: Norm("n c t -> n", d=3),
    "names: twice, of a layer": lambda: Norm("n c t -> n", c=32, sizes={"c": 32}),
    "names: twice, a label": lambda: normalize(x, "n c t -> n kind[c]", kind=ids, labels={"kind": ids}),
    "eps: an axis called eps": lambda: normalize(x, "n (eps c) t -> n eps", sizes={"eps": 4}),
    "eps: an axis called eps, of a layer": lambda: Norm("n (eps c) t -> n eps", eps=4),
}

# --- options ---------------------------------------------------------------------------------------------------------

CASES |= {
    "eps: True": lambda: normalize(x, "n c t -> n", eps=True),
    "eps: None": lambda: Norm("n c t -> n", eps=None),
    "eps: a tensor": lambda: Norm("n c t -> n", eps=torch.tensor(1e-5)),
    "eps: negative": lambda: normalize(x, "n c t -> n", eps=-1.0),
    "eps: set to text later": lambda: _with(Norm("n c t -> n"), eps="1")(x),
    "center: 1": lambda: normalize(x, "n c t -> n", center=1),
    "center: None": lambda: Norm("n c t -> n", center=None),
    "scale: a string": lambda: Norm("n c t -> n", scale="no"),
    "center and scale: False": lambda: Norm("n c t -> n", center=False, scale=False),
    "activation: a function": lambda: Norm("n c t -> n", activation=torch.relu.__name__.upper()),
    "activation: of complex x": lambda: normalize(x.to(torch.complex64), "n c t -> n", activation="relu"),
    "activation: a number": lambda: Norm("n c t -> n", activation=3),
    "bias: a string": lambda: Norm("n c t -> n", affine="c", c=32, bias="no"),
    "dtype: of integers": lambda: Norm("n c t -> n", affine="c", c=32, dtype=torch.int32),
    "momentum: 2": lambda: Norm("n c t -> c", c=32, track_running_stats=True, momentum=2),
    "momentum: True": lambda: Norm("n c t -> c", c=32, track_running_stats=True, momentum=True),
    "momentum: a string": lambda: Norm("n c t -> c", c=32, momentum="0.1"),
    "cumulative: a kept axis": lambda: Norm("b c t -> b t", cumulative="t"),
    "cumulative: no axis": lambda: Norm("b c t -> b c", cumulative="s"),
    "cumulative: nothing is pooled": lambda: normalize(x, "b c t -> b c t", cumulative="t"),
    "cumulative: no string": lambda: normalize(x, "b c t -> b c", cumulative=2),
    "cumulative: with running statistics": lambda: Norm("b c t -> c", c=32, cumulative="t", track_running_stats=True),
    "cumulative: ok": lambda: normalize(x, "b c t -> b c", cumulative="t"),
    "process_group: without sharded": lambda: Norm("n c t -> c", process_group="group"),
    "process_group: without sharded, normalize": lambda: normalize(x, "n c t -> c", process_group="group"),
    "process_group: without sharded, moments": lambda: moments(x, "n c t -> c", process_group="group"),
    "process_group: set without sharded": lambda: _with(Norm("n c t -> c"), process_group="group"),
    "sharded: empty": lambda: Norm("n c t -> c", sharded=""),
    "sharded: a number": lambda: Norm("n c t -> c", sharded=3),
    "sharded: a list of numbers": lambda: Norm("n c t -> c", sharded=[3]),
    "sharded: twice": lambda: Norm("n c t -> c", sharded="n n"),
    "sharded: no axis": lambda: Norm("n c t -> c", sharded="m"),
    "sharded: no axis has a name": lambda: Norm("1 2 -> ", sharded="m"),
    "sharded: the ellipsis": lambda: Norm("n ... -> n", sharded="..."),
    "sharded: an axis that is cumulated": lambda: Norm("b c t -> b c", cumulative="t", sharded="t"),
    "sharded: kept and pooled axes": lambda: Norm("n c t -> c", sharded="n c"),
    "sharded: no process group": lambda: Norm("n c t -> c", sharded="n")(x),
    "sharded: no process group, normalize": lambda: normalize(x, "n c t -> c", sharded="n"),
    "sharded: no process group, moments": lambda: moments(x, "n c t -> c", sharded="n"),
    "sharded: no process group, all_reduce": lambda: moments(x, "n c t -> c").all_reduce(),
    "sharded: nothing is merged": lambda: Norm("n c t -> n", sharded="n")(x),
    "sharded: one rank": lambda: _on_one_rank(lambda group: Norm("n c t -> c", sharded="n")(x)),
    "sharded: another kind of group": lambda: _on_one_rank(
        lambda group: Norm("n c t -> c", sharded="n", process_group="gloo")(x)
    ),
    "sharded: outside of the group": lambda: _on_one_rank(
        lambda group: Norm("n c t -> c", sharded="n", process_group=dist.GroupMember.NON_GROUP_MEMBER)(x)
    ),
    "sharded: a copy of a layer with a group": lambda: _on_one_rank(
        lambda group: copy.deepcopy(Norm("n c t -> c", sharded="n", process_group=group))(x)
    ),
    "sharded: one rank, all_reduce": lambda: _on_one_rank(lambda group: moments(x, "n c t -> c").all_reduce(group)),
    "SyncBatchNorm: one value for each channel": lambda: SyncBatchNorm(6)(torch.zeros(1, 6)),
    "SyncBatchNorm: x of two axes": lambda: SyncBatchNorm(6)(rows),
    "SyncBatchNorm: other channels": lambda: SyncBatchNorm(6)(x),
    "convert_sync_batchnorm: lazy": lambda: convert_sync_batchnorm(nn.Sequential(quiet(nn.LazyBatchNorm2d))),
    "convert_sync_batchnorm: its own forward": lambda: convert_sync_batchnorm(nn.Sequential(_Scaled(6))),
    "convert_sync_batchnorm: a replaced forward": lambda: convert_sync_batchnorm(
        nn.Sequential(_with(nn.BatchNorm2d(6), forward=lambda x: x))
    ),
}


class _Scaled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def _with(thing: Any, **attributes: Any) -> Any:
    """The thing, after its attributes were set."""
    for name, value in attributes.items():
        setattr(thing, name, value)
    return thing


def _on_one_rank(call: Callable[[Any], Any]) -> Any:
    with one_rank() as group:
        return call(group)


# --- masks -----------------------------------------------------------------------------------------------------------

MASKS = {
    "bool": lambda: valid,
    "floating": lambda: valid.float(),
    "float16": lambda: valid.half(),
    "float8": lambda: valid.float().to(torch.float8_e4m3fn),
    "zeros": lambda: torch.zeros(4, 8),
    "nobody": lambda: ~valid,
    "int64": lambda: valid.long(),
    "uint8": lambda: valid.to(torch.uint8),
    "complex": lambda: valid.to(torch.complex64),
    "a list": lambda: valid.tolist(),
    "a numpy array": lambda: valid.numpy(),
    "a number": lambda: 1.0,
    "negative": lambda: valid.float().index_fill(0, torch.tensor(1), -1.0),
    "NaN": lambda: valid.float().index_fill(0, torch.tensor(1), math.nan),
    "Inf": lambda: valid.float().index_fill(0, torch.tensor(1), math.inf),
    "additive": lambda: torch.zeros(4, 8).index_fill(1, torch.tensor(7), -math.inf),
    "transposed": lambda: valid.T,
    "a missing axis": lambda: valid[0],
    "an axis too many": lambda: valid[:, None],
    "of x's shape": lambda: valid[:, None].expand(4, 32, 8),
    "of size 1": lambda: valid[:, :1],
    "a scalar": lambda: torch.tensor(True),
    "sparse": lambda: valid.to_sparse(),
    "meta": lambda: valid.to("meta"),
    "too short": lambda: valid[:, 1:],
}
for name, make in MASKS.items():
    CASES |= {
        f"normalize, mask: {name}": lambda make=make: normalize(x, "n c t, n t -> n", make()),
        f"SequenceGroupNorm, mask: {name}": lambda make=make: SequenceGroupNorm(4, 32)(x, make()),
        f"ChannelGroupNorm, mask: {name}": lambda make=make: ChannelGroupNorm(4, 32)(x, make()),
    }
CASES |= {
    "mask: a pattern without one": lambda: normalize(x, "n c t -> n", valid),
    "mask: a pattern without one, of unknown axes": lambda: normalize(x, "n c t -> n", torch.ones(3)),
    "mask: a pattern without one, a number": lambda: Norm("n c t -> n")(x, 3),
    "mask: a pattern without one, and a label": lambda: normalize(x, "n c t -> kind[c]", ids, kind=ids),
    "mask: none": lambda: normalize(x, "n c t, n t -> n"),
    "mask: axes in another order": lambda: normalize(x, "n c t, t n -> n", valid.T),
    "mask: with moments": lambda: normalize(x, "n c t, n t -> n", valid.float(), moments=moments(x, "n c t -> n")),
    "mask: of an axis of x alone, shape of two axes": lambda: normalize(x, "n c t, t -> n", valid),
    "mask: of no axis": lambda: normalize(x, "n c t, 1 -> n", torch.ones(1)),
}


def _given(layer: nn.Module, x: Any, *args: Any, **around: Any) -> Any:
    with given(**around):
        return layer(x, *args)


# --- labels ----------------------------------------------------------------------------------------------------------

IDS = {
    "int64": lambda: ids,
    "int32": lambda: ids.int(),
    "uint8": lambda: ids.to(torch.uint8),
    "bool": lambda: ids.bool(),
    "floating": lambda: ids.float(),
    "complex": lambda: ids.to(torch.complex64),
    "negative": lambda: ids - 3,
    "all negative": lambda: ids - 100,
    "a list": lambda: ids.tolist(),
    "a tuple": lambda: (1, 2),
    "a numpy array": lambda: ids.numpy(),
    "a number": lambda: 3,
    "a string": lambda: "kind",
    "None": lambda: None,
    "too short": lambda: ids[1:],
    "no ids": lambda: ids[:0],
    "two axes": lambda: ids.view(4, 8),
    "a scalar": lambda: torch.tensor(0),
    "a Partition": lambda: Partition(ids),
    "a Partition too short": lambda: Partition(ids[1:]),
    "a Partition of two axes": lambda: Partition(ids.view(8, 4)),
    "meta": lambda: ids.to("meta"),
    "sparse": lambda: ids.to_sparse(),
}
for name, make in IDS.items():
    CASES |= {
        f"normalize, label: {name}": lambda make=make: normalize(x, "n c t -> n kind[c]", kind=make()),
        f"Norm, static label: {name}": lambda make=make: Norm("n c t -> n kind[c]", kind=make())(x),
        f"Partition, ids: {name}": lambda make=make: Partition(make()),
        f"from_sizes, ids: {name}": lambda make=make: Partition.from_sizes(make()),
        f"ChannelGroupNorm, groups: {name}": lambda make=make: ChannelGroupNorm(32, 32, groups=make())(x),
    }
COUNTS: dict[str, Any] = {"-1": -1, "2.0": 2.0, "True": True, "a string": "3", "2**63": 2**63, "0": 0, "31": 31}
for name, count in COUNTS.items():
    CASES |= {
        f"Partition, count: {name}": lambda count=count: Partition(ids, count),
        f"Partition of nothing, count: {name}": lambda count=count: Partition(ids[:0], count),
        f"Norm, number of values: {name}": lambda count=count: Norm("n c t -> n kind[c]", kind=count)(x, kind=ids),
        f"default_groups: {name}": lambda count=count: default_groups(count),
    }
CASES |= {
    "labels: a list": lambda: normalize(x, "n c t -> kind[c]", labels=[ids]),
    "labels: an unknown one": lambda: normalize(x, "n c t -> kind[c]", labels={"kinds": ids}),
    "labels: missing": lambda: normalize(x, "n c t -> kind[c] other[t]", kind=ids),
    "labels: missing, of a layer": lambda: Norm("n c t -> kind[c]")(x),
    "labels: missing, of a layer that was told the count": lambda: Norm("n c t -> kind[c]", kind=32)(x),
    "labels: missing, in affine=": lambda: normalize(
        x, "n c t -> n", affine="kind[c]", weight=torch.ones(3), kind=None
    ),
    "labels: of two axes": lambda: normalize(x, "n c t -> kind[n t]", kind=torch.zeros(4, 8).long()),
    "labels: of two axes, transposed": lambda: normalize(x, "n c t -> kind[n t]", kind=torch.zeros(8, 4).long()),
    "labels: on another device": lambda: normalize(x, "n c t -> kind[c]", kind=Partition(ids.to("meta"), 32)),
    "labels: static, and given at the call": lambda: Norm("n c t -> kind[c]", kind=ids)(x, kind=ids),
    "labels: static, and x of other channels": lambda: Norm("n c t -> kind[c]", kind=ids)(x[:, :8]),
    "labels: static, from around": lambda: _given(Norm("n c t -> kind[c]", kind=ids), x, kind=ids),
    "labels: not of the layer": lambda: Norm("n c t -> n kind[c]", kind=32)(x, kinds=ids),
    "labels: not of the layer, in labels=": lambda: Norm("n c t -> n")(x, labels={"kind": ids}),
    "labels: labels= of a layer and the keyword": lambda: Norm("n c t -> kind[c]")(x, kind=ids, labels={"kind": ids}),
    "labels: static ids that were written": lambda: _written(Norm("n c t -> kind[c]", kind=ids), "kind_ids", 99),
    "labels: static ids that were written, negative": lambda: _written(
        Norm("n c t -> kind[c]", kind=ids), "kind_ids", -1
    ),
    "labels: group_ids that were written": lambda: _written(ChannelGroupNorm(2, 32, groups=[8, 24]), "group_ids", 2),
    "labels: group_ids that were written, ok": lambda: _written(
        ChannelGroupNorm(2, 32, groups=[8, 24]), "group_ids", 1
    ),
    "given: a number": lambda: given(mask=3),
    "given: a list": lambda: given(graph=[0, 1]),
    "given: a mask of another shape": lambda: _given(Norm("n c t, n t -> c"), x, mask=valid.T),
    "given: a mask of integers": lambda: _given(Norm("n c t, n t -> c"), x, mask=valid.long()),
    "given: negative weights": lambda: _given(Norm("n c t, n t -> c"), x, mask=-valid.float()),
    "given: a label too short": lambda: _given(Norm("n c t -> n kind[c]"), x, kind=ids[1:]),
    "given: a floating label": lambda: _given(Norm("n c t -> n kind[c]"), x, kind=ids.float()),
    "given: a Partition of more values": lambda: _given(Norm("n c t -> n kind[c]", kind=30), x, kind=Partition(ids)),
    "labels: of 30 values, and one too large": lambda: Norm("n c t -> n kind[c]", kind=30)(x, kind=ids),
    "labels: of 30 values, a Partition of more": lambda: Norm("n c t -> n kind[c]", kind=30)(x, kind=Partition(ids)),
    "given: a label that nobody reads": lambda: _given(Norm("n c t -> n"), x, kind=ids),
    "given: a mask that nobody reads": lambda: _given(Norm("n c t -> n"), x, mask=valid),
    "given: another error inside": lambda: _given(Norm("n c -> n"), x, mask=valid),
    "given: gone when a checkpoint is computed again": lambda: _checkpointed(),
    "Partition: check": lambda: Partition._made(ids, 3).check(),
    "Partition: is equal to": lambda: Partition(ids) == ids,
    "Partition: hash": lambda: hash(Partition(ids)),
    "from_sizes: negative": lambda: Partition.from_sizes([1, -2]),
    "from_sizes: floats": lambda: Partition.from_sizes([1.0, 2.0]),
    "from_sizes: strings": lambda: Partition.from_sizes("12"),
    "from_sizes: too large": lambda: Partition.from_sizes([2**63]),
    "from_sizes: a tensor of floats": lambda: Partition.from_sizes(torch.tensor([1.0])),
    "from_sizes: a generator": lambda: Partition.from_sizes(size for size in (1, 2)),
    "from_offsets: nothing": lambda: Partition.from_offsets([]),
    "from_offsets: a beginning of 1": lambda: Partition.from_offsets([1, 2]),
    "from_offsets: falling": lambda: Partition.from_offsets([0, 2, 1]),
    "from_offsets: two axes": lambda: Partition.from_offsets(torch.zeros(2, 2).long()),
    "from_offsets: one": lambda: Partition.from_offsets([0]),
}  # fmt: skip


def _written(layer: nn.Module, name: str, value: int) -> Any:
    """A call after an id of a static label was written to, by the way that every version has: the state dict."""
    state = {key: t.clone() for key, t in layer.state_dict().items()}
    state[name][3] = value
    layer.load_state_dict(state)
    return layer(x)


def _checkpointed() -> None:
    layer, t = Norm("n c t, n t -> c"), x.clone().requires_grad_()
    with given(mask=valid):
        y = checkpoint(layer, t, use_reentrant=False)
    y.sum().backward()


# --- parameters and moments ------------------------------------------------------------------------------------------

c32 = torch.ones(32)
WEIGHTS = {
    "of c": lambda: c32,
    "of t": lambda: torch.ones(8),
    "of a size that no axis has": lambda: torch.ones(5),
    "of two axes": lambda: torch.ones(32, 8),
    "a scalar": lambda: torch.tensor(1.0),
    "int64": lambda: c32.long(),
    "complex": lambda: c32.to(torch.complex64),
    "float16": lambda: c32.half(),
    "float64": lambda: c32.double(),
    "float8": lambda: c32.to(torch.float8_e4m3fn),
    "a number": lambda: 2.0,
    "a list": lambda: [1.0] * 32,
    "sparse": lambda: c32.to_sparse(),
    "meta": lambda: c32.to("meta"),
}
for name, make in WEIGHTS.items():
    CASES |= {
        f"normalize, weight: {name}": lambda make=make: normalize(x, "n c t -> n", weight=make(), affine="c"),
        f"moments= with a mean {name}": lambda make=make: normalize(
            x, "n c t -> c", moments=Moments(c32.long(), make(), c32)
        ),
    }
c4 = torch.ones(4)
CASES |= {
    "bias: of other axes": lambda: normalize(x, "n c t -> n", weight=c32, bias=torch.ones(8), affine="c"),
    "bias: integers": lambda: normalize(x, "n c t -> n", weight=c32, bias=c32.long(), affine="c"),
    "bias: a number": lambda: normalize(x, "n c t -> n", weight=c32, bias=2.0, affine="c"),
    "conditional: weight of other axes": lambda: Norm("n c t -> n", affine="t", t=8, conditional="c")(
        x, weight=torch.ones(8)
    ),
    "conditional: weight, a number": lambda: Norm("n c t -> n", conditional="c")(x, weight=2.0),
    "conditional: ok": lambda: Norm("n c t -> n", affine="t", t=8, conditional="c")(x, weight=c32),
    "affine: a list": lambda: Norm("n c t -> n", affine=["c"]),
    "affine: of normalize, a list": lambda: normalize(x, "n c t -> n", affine=["c"], weight=c32),
    "affine: a mask": lambda: Norm("n c t -> n", affine="c, t"),
    "affine: an unknown axis": lambda: Norm("n c t -> n", affine="d"),
    "affine: an axis twice": lambda: Norm("n c t -> n", affine="c c"),
    "affine: a number": lambda: Norm("n c t -> n", affine="3"),
    "affine: the ellipsis": lambda: Norm("n ... -> n", affine="..."),
    "affine: no sizes": lambda: Norm("n c t -> n", affine="c"),
    "affine: some sizes": lambda: Norm("n c t -> n", affine="c t", c=32),
    "affine: an axis of a composition": lambda: Norm("n (g c) t -> n g", affine="(g c)", c=8),
    "affine: an option's name": lambda: Norm("n scale -> n", affine="scale"),
    "affine: a label without a count": lambda: Norm("n c -> n", affine="kind[c]"),
    "affine: a label of the pattern at other axes": lambda: Norm("n c t -> kind[c]", affine="kind[t]"),
    "affine: an axis called as a label": lambda: Norm("n c t -> n", affine="c[t]"),
    "affine: of no axis": lambda: Norm("n c t -> n", affine="")(x),
    "affine: x of other channels": lambda: Norm("n c t -> n", affine="c", c=6)(x),
    "weight: without affine": lambda: normalize(x, "n c t -> n", weight=c32),
    "bias: without affine": lambda: normalize(x, "n c t -> n", bias=2.0),
    "weight and bias: neither": lambda: normalize(x, "n c t -> n", affine="c"),
    "conditional: a list": lambda: Norm("n c t -> n", conditional=["c"]),
    "conditional: an unknown axis": lambda: Norm("n c t -> n", conditional="d"),
    "conditional: neither": lambda: Norm("n c t -> n", conditional="c")(x),
    "conditional: weight and bias of a layer that is not": lambda: Norm("n c t -> n")(x, weight=c32, bias=c32),
    "conditional: bias of a layer that is not": lambda: Norm("n c t -> n", affine="c", c=32)(x, bias=c32),
    "conditional: bias alone": lambda: Norm("n c t -> n", affine="c", c=32, conditional="n c")(
        x, bias=torch.ones(4, 32)
    ),
    "moments: a tuple": lambda: normalize(x, "n c t -> n", moments=(c4, c4, c4)),
    "moments: a tensor": lambda: Norm("n c t -> n")(x, moments=c4),
    "moments: of other sets": lambda: normalize(x, "n c t -> n", moments=moments(x, "n c t -> c")),
    "moments: a mean that is no tensor": lambda: normalize(x, "n c t -> n", moments=Moments(c4, 0.0, c4)),
    "moments: fields of several shapes": lambda: normalize(x, "n c t -> n", moments=Moments(c4, c4, torch.ones(3))),
    "moments: fields on several devices": lambda: normalize(x, "n c t -> n", moments=Moments(c4, c4, c4.to("meta"))),
    "moments: low that is no tensor": lambda: normalize(x, "n c t -> n", moments=Moments(c4, c4, c4, 0.0)),
    "moments: complex for real x": lambda: normalize(
        x, "n c t -> n", moments=Moments(c4, c4.to(torch.complex64), c4)
    ),
    "moments: real for complex x": lambda: normalize(
        x.to(torch.complex64), "n c t -> n", moments=Moments(c4, c4, c4)
    ),
    "merge: a tensor": lambda: moments(x, "n c t -> n").merge(c4),
    "merge: other sets": lambda: moments(x, "n c t -> n").merge(moments(x, "n c t -> c")),
    "merge: fields of several shapes": lambda: Moments(c4, c4, c32).merge(Moments(c4, c4, c4)),
    "cumulative moments: an axis too far": lambda: moments(x, "n c t -> n").cumulative(1),
    "cumulative moments: of a scalar": lambda: moments(x, "n c t -> ").cumulative(),
    "coarsen: a mask": lambda: moments(x, "n c t -> n c").coarsen("n c, n -> c"),
    "coarsen: other axes": lambda: moments(x, "n c t -> n c").coarsen("n -> "),
    "coarsen: a size for an axis as a keyword": lambda: moments(x, "n c t -> n c").coarsen("n c -> n", c=32),
    "coarsen: no label": lambda: moments(x, "n c t -> n c").coarsen("n c -> kind[c]"),
    "coarsen: ids": lambda: moments(x, "n c t -> n c").coarsen("n c -> kind[c]", kind=ids),
    "coarsen: a Partition too short": lambda: moments(x, "n c t -> n c").coarsen(
        "n c -> kind[c]", kind=Partition(ids[1:])
    ),
    "coarsen: sizes that are wrong": lambda: moments(x, "n c t -> n c").coarsen("n c -> n", sizes={"c": 3}),
    "coarsen: no pattern": lambda: moments(x, "n c t -> n c").coarsen(3),
    "coarsen: ok": lambda: moments(x, "n c t -> n c").coarsen("n c -> kind[c]", kind=Partition(ids)),
    "refine: other sets": lambda: moments(x, "n c t -> n c").refine("n c -> n", (4, 32)),
    "refine: a shape too short": lambda: moments(x, "n c t -> n").refine("n c -> n", (4,)),
    "refine: a label": lambda: moments(x, "n c t -> n").refine("n c -> kind[n]", (4, 32)),
    "weighed: a number": lambda: moments(x, "n c t -> n c").weighed(0.5),
    "weighed: integers": lambda: moments(x, "n c t -> n c").weighed(ids),
    "weighed: another shape": lambda: moments(x, "n c t -> n c").weighed(torch.ones(3)),
    "mixed: a list": lambda: moments(x, "n c t -> n c").mixed([0.5, 0.5]),
    "mixed: another shape": lambda: moments(x, "n c t -> n c").mixed(c32, torch.ones(7)),
    "mixed_results: integers": lambda: moments(x, "n c t -> n c").mixed_results(ids, 1e-5),
}  # fmt: skip

# --- layers: running statistics, streams, states ---------------------------------------------------------------------


def _running(**options: Any) -> Norm:
    return Norm("n c t -> c", **{"c": 32, "track_running_stats": True, **options})


def _grad(layer: nn.Module, **options: Any) -> Any:
    """The gradient of the sum of a result, by torch.func."""

    def total(t: torch.Tensor) -> torch.Tensor:
        y = layer(t, **options)
        return (y[0] if isinstance(y, tuple) else y).sum()

    return torch.func.grad(total)(x)


def _loaded(layer: nn.Module, **state: Any) -> Any:
    """What loading changes, without torch's own words."""
    return layer.load_state_dict({**layer.state_dict(), **state})


stream = Norm("b c t -> b c", cumulative="t")
CASES |= {
    "running: no size": lambda: Norm("n c t -> c", track_running_stats=True),
    "running: sets of the batch": lambda: Norm("n c t -> n c", c=32, track_running_stats=True),
    "running: sets of the batch, of two": lambda: Norm("n c t -> n", track_running_stats=True),
    "running: a label without a count": lambda: Norm("n c t -> kind[c]", track_running_stats=True),
    "running: the ellipsis": lambda: Norm("n ... -> ...", track_running_stats=True),
    "running: a composition": lambda: Norm("n (g c) -> g", track_running_stats=True),
    "running: an option's name": lambda: Norm("n scale -> scale", track_running_stats=True),
    "running: no batch was seen": lambda: _running().eval()(x),
    "running: no batch was seen, and some labels": lambda: Norm(
        "n c t -> kind[c]", kind=ids, track_running_stats=True
    ).eval()(x),
    "running: a batch of nothing": lambda: _running()(x[:0]),
    "running: one element for each set": lambda: _running()(x[:1, :, :1]),
    "running: complex x": lambda: _running()(x.to(torch.complex64)),
    "running: real x of a complex layer": lambda: _running(dtype=torch.complex64)(x),
    "running: within torch.func": lambda: _grad(_running()),
    "running: within torch.func, return_moments": lambda: _grad(_running(), return_moments=True),
    "running: x of other channels": lambda: _running()(x[:, :8]),
    "updated: no running statistics": lambda: Norm("n c t -> c").updated(moments(x, "n c t -> c")),
    "updated: no moments": lambda: _running().updated(c32),
    "updated: of other sets": lambda: _running().updated(moments(x, "n c t -> n")),
    "updated: ok": lambda: _running().updated(moments(x, "n c t -> c")),
    "calibrate: no norm": lambda: calibrate(nn.Sequential(nn.Linear(3, 3)), [x]),
    "calibrate: no running statistics": lambda: calibrate(Norm("n c t -> c"), [x]),
    "calibrate: a tensor": lambda: calibrate(_running(), x),
    "calibrate: no batch": lambda: calibrate(_running(), []),
    "calibrate: batches of nothing": lambda: calibrate(_running(), [x[:0], x[:0]]),
    "calibrate: a batch that does not fit": lambda: calibrate(_running(), [x, x[0]]),
    "calibrate: ok": lambda: type(calibrate(_running(), [x])).__name__,
    "step: not cumulative": lambda: Norm("b c t -> b c").step(x),
    "step: no state": lambda: stream.step(x, x),
    "step: three tensors": lambda: stream.step(x, (x, x, x)),
    "step: four numbers": lambda: stream.step(x, (0, 0, 0, 0)),
    "step: of other sets": lambda: stream.step(x, (c32,) * 4),
    "step: of several shapes": lambda: stream.step(x, (c32, c4, c4, c4)),
    "step: a label that is none": lambda: stream.step(x, kind=ids),
    "step: a mask that the pattern lacks": lambda: stream.step(x, None, valid),
    "step: x of other axes": lambda: stream.step(x[0]),
    "step: ok": lambda: stream.step(x, stream.step(x)[1]),
    "load_state_dict: version 1 has no counter": lambda: _loaded(_running()),
    "return_moments: ok": lambda: Norm("n c t -> n")(x, return_moments=True),
}

# --- images ----------------------------------------------------------------------------------------------------------

CASES |= {
    "default_groups: a prime": lambda: default_groups(31),
    "ChannelGroupNorm: groups that do not divide": lambda: ChannelGroupNorm(4, 6),
    "ChannelGroupNorm: no group": lambda: ChannelGroupNorm(0, 6),
    "ChannelGroupNorm: a float": lambda: ChannelGroupNorm(2.0, 6),
    "ChannelGroupNorm: no channel": lambda: ChannelGroupNorm(1, 0),
    "ChannelGroupNorm: channels is None": lambda: ChannelGroupNorm(2, None),
    "ChannelGroupNorm: zero_init without affine": lambda: ChannelGroupNorm(2, 6, affine=False, zero_init=True),
    "ChannelGroupNorm: activation": lambda: ChannelGroupNorm(2, 6, activation="tanh"),
    "ChannelGroupNorm: eps": lambda: ChannelGroupNorm(2, 6, "1e-5"),
    "ChannelGroupNorm: bias": lambda: ChannelGroupNorm(2, 6, bias=0),
    "ChannelGroupNorm: dtype": lambda: ChannelGroupNorm(2, 6, dtype=torch.int64),
    "ChannelGroupNorm: groups=number": lambda: ChannelGroupNorm(2, 6, groups=2),
    "ChannelGroupNorm: groups=string": lambda: ChannelGroupNorm(2, 6, groups="24"),
    "ChannelGroupNorm: groups= of another number": lambda: ChannelGroupNorm(2, 6, groups=[1, 2, 3]),
    "ChannelGroupNorm: groups= of other channels": lambda: ChannelGroupNorm(3, 6, groups=[1, 2, 4]),
    "ChannelGroupNorm: groups= an id too large": lambda: ChannelGroupNorm(2, 6, groups=KIND),
    "ChannelGroupNorm: groups= a Partition": lambda: ChannelGroupNorm(2, 6, groups=Partition(KIND)),
    "ChannelGroupNorm: groups= two axes": lambda: ChannelGroupNorm(3, 6, groups=KIND.view(2, 3)),
    "ChannelGroupNorm: groups= an empty one": lambda: ChannelGroupNorm(3, 6, groups=[3, 0, 3])(image),
    "ChannelGroupNorm: other channels": lambda: ChannelGroupNorm(2, 6)(x),
    "ChannelGroupNorm: channels last": lambda: ChannelGroupNorm(2, 6)(image.movedim(1, -1)),
    "ChannelGroupNorm: one axis": lambda: ChannelGroupNorm(2, 6)(image[0, :, 0, 0]),
    "ChannelGroupNorm: one value for each group": lambda: ChannelGroupNorm(6, 6)(torch.zeros(1, 6)),
    "ChannelGroupNorm: one value for each group of several images": lambda: ChannelGroupNorm(6, 6)(rows),
    "ChannelGroupNorm: mask with a channel": lambda: ChannelGroupNorm(2, 6)(image, pixels[:, None]),
    "ChannelGroupNorm: mask of one axis": lambda: ChannelGroupNorm(2, 6)(image, torch.ones(5)),
    "ChannelGroupNorm: mask of one axis that is none": lambda: ChannelGroupNorm(2, 6)(image, torch.ones(7)),
    "ChannelGroupNorm: mask of the image": lambda: ChannelGroupNorm(2, 6)(image, pixels[0]),
    "ChannelGroupNorm: mask of size 1": lambda: ChannelGroupNorm(2, 6)(image, torch.ones(1, 1, 5)),
    "ChannelGroupNorm: mask, a list": lambda: ChannelGroupNorm(2, 6)(image, [1]),
    "ChannelGroupNorm: moments of other sets": lambda: ChannelGroupNorm(2, 6)(
        image, moments=moments(image, "n c ... -> n c")
    ),
    "ChannelGroupNorm: a keyword": lambda: ChannelGroupNorm(2, 6)(image, lengths=[1, 2]),
    "ChannelAffine: other channels": lambda: ChannelAffine(6)(x),
    "ChannelAffine: no channels": lambda: ChannelAffine(0),
}

# --- sequences -------------------------------------------------------------------------------------------------------

packed = torch.zeros(7, 6)
tokens = torch.zeros(2, 5, 6)
on = torch.ones(2, 5, dtype=torch.bool)
LENGTHS: dict[str, Callable[[], Any]] = {
    "a list": lambda: [5, 3],
    "a tensor": lambda: torch.tensor([5, 3]),
    "uint8": lambda: torch.tensor([5, 3], dtype=torch.uint8),
    "floating": lambda: torch.tensor([1.0, 0.6]),
    "bool": lambda: torch.tensor([True, False]),
    "complex": lambda: torch.tensor([5, 3]).to(torch.complex64),
    "a list of floats": lambda: [5.0, 3.0],
    "a number": lambda: 5,
    "a string": lambda: "53",
    "too few": lambda: [5],
    "two axes": lambda: torch.tensor([[5], [3]]),
    "beyond": lambda: [6, 3],
    "negative": lambda: [5, -1],
    "zero": lambda: [5, 0],
    "none": lambda: [0, 0],
    "meta": lambda: torch.tensor([5, 3], device="meta"),
}
for name, make in LENGTHS.items():
    CASES |= {
        f"as_mask, lengths: {name}": lambda make=make: as_mask(lengths=make(), batch=2, time=5),
        f"SequenceGroupNorm, lengths: {name}": lambda make=make: SequenceGroupNorm(2, 6)(tokens.mT, lengths=make()),
        f"frame_lengths, lengths: {name}": lambda make=make: frame_lengths(make(), (3, 2)),
    }
AS_MASK: dict[str, dict[str, Any]] = {
    "nothing": {},
    "mask and lengths": {"mask": on, "lengths": [5, 3]},
    "all three": {"mask": on, "lengths": [5, 3], "key_padding_mask": on},
    "mask, a list": {"mask": [[1, 0]]},
    "mask, floating": {"mask": on.float()},
    "mask, complex": {"mask": on.to(torch.complex64)},
    "mask, additive": {"mask": torch.zeros(2, 5).index_fill(1, torch.tensor(4), -math.inf)},
    "mask, 0 and 1": {"mask": on.long()},
    "mask, 0 and 2": {"mask": on.long() * 2},
    "mask, negative": {"mask": -on.long()},
    "mask, meta": {"mask": on.long().to("meta")},
    "mask, further axes": {"mask": on[:, None]},
    "mask, further axes behind": {"mask": on[..., None]},
    "mask, of pairs": {"mask": on[:, None, :, None].expand(2, 1, 5, 5)},
    "mask, transposed": {"mask": on.T},
    "mask, too short": {"mask": on[:, 1:]},
    "mask, one sequence": {"mask": on[0]},
    "key_padding_mask": {"key_padding_mask": on},
    "key_padding_mask, integers": {"key_padding_mask": on.long()},
    "key_padding_mask, additive": {"key_padding_mask": on.float()},
    "key_padding_mask, a list": {"key_padding_mask": [[True]]},
    "key_padding_mask, transposed": {"key_padding_mask": on.T},
}
for name, options in AS_MASK.items():
    CASES |= {
        f"as_mask: {name}": lambda options=options: as_mask(**options, batch=2, time=5),
    }
CU: dict[str, Callable[[], Any]] = {
    "ok": lambda: torch.tensor([0, 3, 7]),
    "int32": lambda: torch.tensor([0, 3, 7], dtype=torch.int32),
    "a Partition": lambda: Partition.from_sizes([3, 4]),
    "a Partition too short": lambda: Partition.from_sizes([3, 3]),
    "a list": lambda: [0, 3, 7],
    "floating": lambda: torch.tensor([0.0, 3.0, 7.0]),
    "two axes": lambda: torch.tensor([[0, 3, 7]]),
    "nothing": lambda: torch.tensor([], dtype=torch.int64),
    "a beginning of 1": lambda: torch.tensor([1, 3, 7]),
    "an end too early": lambda: torch.tensor([0, 3, 6]),
    "falling": lambda: torch.tensor([0, 5, 3, 7]),
}
for name, make in CU.items():
    CASES |= {
        f"SequenceGroupNorm, cu_seqlens: {name}": lambda make=make: SequenceGroupNorm(2, 6)(packed, cu_seqlens=make()),
        f"given, cu_seqlens: {name}": lambda make=make: _given_cu(make()),
    }


def _given_cu(cu: Any) -> Any:
    return _given(SequenceGroupNorm(2, 6), packed, cu_seqlens=cu)


CASES |= {
    "SequenceGroupNorm: groups that do not divide": lambda: SequenceGroupNorm(4, 6),
    "SequenceGroupNorm: no group": lambda: SequenceGroupNorm(0, 6),
    "SequenceGroupNorm: a float": lambda: SequenceGroupNorm(2.0, 6),
    "SequenceGroupNorm: two axes": lambda: SequenceGroupNorm(2, 6)(packed),
    "SequenceGroupNorm: two axes, one sequence": lambda: SequenceGroupNorm(2, 6)(packed.T),
    "SequenceGroupNorm: four axes": lambda: SequenceGroupNorm(2, 6)(image),
    "SequenceGroupNorm: channels last": lambda: SequenceGroupNorm(2, 6)(tokens),
    "SequenceGroupNorm: channels first": lambda: SequenceGroupNorm(2, 6, channels_last=True)(tokens.mT),
    "SequenceGroupNorm: other channels": lambda: SequenceGroupNorm(2, 6)(x),
    "SequenceGroupNorm: one value for each group": lambda: SequenceGroupNorm(6, 6)(torch.zeros(1, 6, 1)),
    "SequenceGroupNorm: cu_seqlens and lengths": lambda: SequenceGroupNorm(2, 6)(
        packed, lengths=[3, 4], cu_seqlens=torch.tensor([0, 3, 7])
    ),
    "SequenceGroupNorm: cu_seqlens and a mask": lambda: SequenceGroupNorm(2, 6)(
        packed, torch.ones(7, dtype=torch.bool), cu_seqlens=torch.tensor([0, 3, 7])
    ),
    "SequenceGroupNorm: cu_seqlens and a mask too short": lambda: SequenceGroupNorm(2, 6)(
        packed, torch.ones(6, dtype=torch.bool), cu_seqlens=torch.tensor([0, 3, 7])
    ),
    "SequenceGroupNorm: cu_seqlens of padded x": lambda: SequenceGroupNorm(2, 6)(
        tokens.mT, cu_seqlens=torch.tensor([0, 3, 7])
    ),
    "SequenceGroupNorm: cu_seqlens of other channels": lambda: SequenceGroupNorm(2, 6)(
        packed[:, :4], cu_seqlens=torch.tensor([0, 3, 7])
    ),
    "SequenceGroupNorm: jagged": lambda: SequenceGroupNorm(2, 6)(nested(torch.jagged)),
    "SequenceGroupNorm: jagged with lengths": lambda: SequenceGroupNorm(2, 6)(nested(torch.jagged), lengths=[3, 2]),
    "SequenceGroupNorm: jagged, other channels": lambda: SequenceGroupNorm(2, 4)(nested(torch.jagged)),
    "SequenceGroupNorm: jagged, transposed": lambda: SequenceGroupNorm(2, 6)(nested(torch.jagged).transpose(1, 2)),
    "SequenceGroupNorm: nested, strided": lambda: SequenceGroupNorm(2, 6)(nested(torch.strided)),
    "SequenceGroupNorm: a mask from around": lambda: _given(SequenceGroupNorm(2, 6), tokens.mT, mask=on.T),
    "TokenGroupNorm: groups that do not divide": lambda: TokenGroupNorm(4, 6),
    "TokenGroupNorm: other channels": lambda: TokenGroupNorm(2, 6)(x),
    "TokenGroupNorm: channels first": lambda: TokenGroupNorm(2, 6)(tokens.mT),
    "TokenGroupNorm: a scalar": lambda: TokenGroupNorm(2, 6)(torch.tensor(1.0)),
    "TokenGroupNorm: one token": lambda: TokenGroupNorm(2, 6)(torch.zeros(6)),
    "TokenGroupNorm: one token and a mask": lambda: TokenGroupNorm(2, 6)(torch.zeros(6), torch.tensor(True)),
    "TokenGroupNorm: one value for each group": lambda: TokenGroupNorm(6, 6)(torch.zeros(6)),
    "TokenGroupNorm: jagged": lambda: TokenGroupNorm(2, 6)(nested(torch.jagged)),
    "TokenGroupNorm: jagged, the last axis": lambda: TokenGroupNorm(2, 6)(nested(torch.jagged).transpose(1, 2)),
    "TokenGroupNorm: jagged with a mask": lambda: TokenGroupNorm(2, 6)(nested(torch.jagged), on),
    "frame_lengths: a linear layer": lambda: frame_lengths([5, 3], nn.Linear(3, 3)),
    "frame_lengths: an unknown layer": lambda: frame_lengths([5, 3], nn.Sequential(nn.Flatten())),
    "frame_lengths: a string": lambda: frame_lengths([5, 3], "conv"),
    "frame_lengths: a number": lambda: frame_lengths([5, 3], 3),
    "frame_lengths: a window of floats": lambda: frame_lengths([5, 3], (3.0, 2)),
    "frame_lengths: five numbers": lambda: frame_lengths([5, 3], (3, 2, 1, 1, 1)),
    "frame_lengths: layers": lambda: frame_lengths(
        [50, 3], nn.Sequential(nn.Conv1d(1, 1, 3, 2), nn.ReLU()), nn.ConvTranspose1d(1, 1, 3), nn.MaxPool1d(2)
    ),
}  # fmt: skip

# --- spectrograms ----------------------------------------------------------------------------------------------------

CASES |= {
    "MelBandNorm: a number of bands alone": lambda: MelBandNorm(3),
    "MelBandNorm: no band": lambda: MelBandNorm(0, 6),
    "MelBandNorm: more bands than frequencies": lambda: MelBandNorm(7, 6),
    "MelBandNorm: a float": lambda: MelBandNorm(3.0, 6),
    "MelBandNorm: a string": lambda: MelBandNorm("3", 6),
    "MelBandNorm: num_frequencies": lambda: MelBandNorm(3, 6.0),
    "MelBandNorm: other frequencies": lambda: MelBandNorm([1, 2], 6),
    "MelBandNorm: two axes of ids": lambda: MelBandNorm(KIND.view(2, 3)),
    "MelBandNorm: negative sizes": lambda: MelBandNorm([-1, 2]),
    "MelBandNorm: affine": lambda: MelBandNorm(3, 6, affine="time"),
    "MelBandNorm: affine, nothing": lambda: MelBandNorm(3, 6, affine=""),
    "MelBandNorm: affine, True": lambda: MelBandNorm(3, 6, affine=True),
    "MelBandNorm: affine twice": lambda: MelBandNorm(3, 6, affine="band band"),
    "MelBandNorm: channels without a number": lambda: MelBandNorm(3, 6, affine="channel"),
    "MelBandNorm: a number without channels": lambda: MelBandNorm(3, 6, num_channels=2),
    "MelBandNorm: a number of channels that is none": lambda: MelBandNorm(3, 6, affine="channel", num_channels=0),
    "MelBandNorm: two axes": lambda: MelBandNorm(3, 6)(spectrogram[0]),
    "MelBandNorm: five axes": lambda: MelBandNorm(3, 6)(spectrogram[None, None]),
    "MelBandNorm: time before frequency": lambda: MelBandNorm(3, 6)(spectrogram.mT),
    "MelBandNorm: x of other frequencies": lambda: MelBandNorm(3, 9)(spectrogram),
    "MelBandNorm: three axes and channels": lambda: MelBandNorm(3, 6, affine="channel", num_channels=2)(spectrogram),
    "MelBandNorm: lengths and a mask": lambda: MelBandNorm(3, 6)(spectrogram, [7, 7], mask=torch.ones(2, 7)),
    "MelBandNorm: a mask from around": lambda: _given(MelBandNorm(3, 6), spectrogram, mask=torch.ones(7, 2).bool()),
    "MelBandNorm: moments of other sets": lambda: MelBandNorm(3, 6)(
        spectrogram, moments=moments(spectrogram, "n f t -> n")
    ),
    "CepstralNorm: mode": lambda: CepstralNorm("sliding"),
    "CepstralNorm: mode, a number": lambda: CepstralNorm(80),
    "CepstralNorm: fixed without features": lambda: CepstralNorm("fixed"),
    "CepstralNorm: features": lambda: CepstralNorm("fixed", 0),
    "CepstralNorm: not fitted": lambda: CepstralNorm("fixed", 6)(spectrogram),
    "CepstralNorm: fit of another mode": lambda: CepstralNorm().fit([spectrogram]),
    "CepstralNorm: fit, a tensor": lambda: CepstralNorm("fixed", 6).fit(spectrogram),
    "CepstralNorm: fit, nothing": lambda: CepstralNorm("fixed", 6).fit([]),
    "CepstralNorm: fit, no frame": lambda: CepstralNorm("fixed", 6).fit([spectrogram[..., :0]]),
    "CepstralNorm: fit, Inf": lambda: CepstralNorm("fixed", 6).fit([spectrogram - math.inf]),
    "CepstralNorm: fit, other features": lambda: CepstralNorm("fixed", 6).fit([spectrogram.mT]),
    "CepstralNorm: fit, lengths": lambda: CepstralNorm("fixed", 6).fit([(spectrogram, [8, 7])]),
    "CepstralNorm: two axes": lambda: CepstralNorm()(spectrogram[0]),
    "CepstralNorm: other features": lambda: CepstralNorm("cumulative", 5)(spectrogram),
    "CepstralNorm: step of another mode": lambda: CepstralNorm().step(spectrogram),
    "CepstralNorm: step": lambda: CepstralNorm("cumulative", 6).step(spectrogram),
    "hz_bands: neither axis": lambda: hz_bands([300], sample_rate=16000),
    "hz_bands: both axes": lambda: hz_bands([300], sample_rate=16000, n_mels=80, n_freqs=201),
    "hz_bands: sample_rate": lambda: hz_bands([300], sample_rate=0, n_freqs=201),
    "hz_bands: f_min": lambda: hz_bands([300], sample_rate=16000, n_freqs=201, f_min=-1),
    "hz_bands: f_max": lambda: hz_bands([300], sample_rate=16000, n_freqs=201, f_max="8000"),
    "hz_bands: edges, a number": lambda: hz_bands(300, sample_rate=16000, n_freqs=201),
    "hz_bands: edges, strings": lambda: hz_bands(["300"], sample_rate=16000, n_freqs=201),
    "hz_bands: edges fall": lambda: hz_bands([300, 200], sample_rate=16000, n_freqs=201),
    "hz_bands: edges outside": lambda: hz_bands([0, 300, 9000], sample_rate=16000, n_freqs=201),
    "hz_bands: edges too near": lambda: hz_bands([300, 301], sample_rate=16000, n_freqs=201),
    "hz_bands: edges of two axes": lambda: hz_bands(torch.ones(2, 2), sample_rate=16000, n_freqs=201),
    "hz_bands: n_freqs": lambda: hz_bands([300], sample_rate=16000, n_freqs=0),
    "hz_bands: ok": lambda: hz_bands([300, 1000], sample_rate=16000, n_freqs=201),
    "mel_bands: n_freqs": lambda: mel_bands(0, 8, 16000),
    "mel_bands: n_bands": lambda: mel_bands(201, 8.0, 16000),
    "mel_bands: f_max": lambda: mel_bands(201, 8, 16000, f_max=9000),
    "mel_bands: f_min": lambda: mel_bands(201, 8, 16000, f_min=9000),
    "mel_bands: mel_scale": lambda: mel_bands(201, 8, 16000, mel_scale="bark"),
}  # fmt: skip

# --- presets ---------------------------------------------------------------------------------------------------------

video = torch.zeros(2, 6, 3, 4, 5)
frames = torch.ones(2, 3, dtype=torch.bool)
signal = torch.zeros(2, 6, 16)
regions = torch.zeros(2, 4, 5, dtype=torch.int64)
part = torch.tensor([0, 1, 1, 0, 1])
table = torch.arange(30.0).view(5, 6)
group = torch.tensor([0, 1, -1, 0, 1])
for name, build in {
    "WeightedGroupNorm": WeightedGroupNorm,
    "TemporalGroupNorm": TemporalGroupNorm,
    "SubgraphNorm": SubgraphNorm,
    "DualNorm": DualNorm,
    "ContextNorm": ContextNorm,
    "SoftGroupNorm": SoftGroupNorm,
    "SpectralGroupNorm": lambda g, c: SpectralGroupNorm(g, c, 3, 16),
}.items():
    CASES |= {
        f"{name}: groups that do not divide": lambda build=build: build(4, 6),
        f"{name}: no group": lambda build=build: build(0, 6),
        f"{name}: no channel": lambda build=build: build(2, 0),
        f"{name}: a float": lambda build=build: build(2, 6.0),
    }
CASES |= {
    "WeightedGroupNorm: other channels": lambda: WeightedGroupNorm(2, 6)(x),
    "WeightedGroupNorm: other channels and a mask": lambda: WeightedGroupNorm(2, 6)(x, valid),
    "WeightedGroupNorm: one axis": lambda: WeightedGroupNorm(2, 6)(torch.zeros(6)),
    "WeightedGroupNorm: mask of the image": lambda: WeightedGroupNorm(2, 6)(image, pixels[0]),
    "WeightedGroupNorm: negative weights": lambda: WeightedGroupNorm(2, 6)(image, -pixels.float()),
    "WeightedGroupNorm: a list": lambda: WeightedGroupNorm(2, 6)(image, [1]),
    "WeightedGroupNorm: moments of other sets": lambda: WeightedGroupNorm(2, 6)(
        image, pixels, moments=moments(image, "n c ... -> n")
    ),
    "WeightedGroupNorm: NaN in the weights of channels": lambda: _nan_weights(WeightedGroupNorm(2, 6)),
    "TemporalGroupNorm: mode": lambda: TemporalGroupNorm(2, 6, "video"),
    "TemporalGroupNorm: step of another mode": lambda: TemporalGroupNorm(2, 6).step(video),
    "TemporalGroupNorm: two axes": lambda: TemporalGroupNorm(2, 6)(rows),
    "TemporalGroupNorm: other channels": lambda: TemporalGroupNorm(2, 6)(video.transpose(1, 2)),
    "TemporalGroupNorm: mask": lambda: TemporalGroupNorm(2, 6)(video, frames.T),
    "TemporalGroupNorm: causal": lambda: TemporalGroupNorm(2, 6, "causal")(video, frames),
    "SpectralGroupNorm: a number of bands alone": lambda: SpectralGroupNorm(2, 6, 3),
    "SpectralGroupNorm: num_samples": lambda: SpectralGroupNorm(2, 6, 3, 0),
    "SpectralGroupNorm: complex weights": lambda: SpectralGroupNorm(2, 6, 3, 16, dtype=torch.complex64),
    "SpectralGroupNorm: too many bands": lambda: SpectralGroupNorm(2, 6, 10, 16),
    "SpectralGroupNorm: bands, a float": lambda: SpectralGroupNorm(2, 6, 3.0, 16),
    "SpectralGroupNorm: an empty band": lambda: SpectralGroupNorm(2, 6, [4, 0, 5], 16),
    "SpectralGroupNorm: other frequencies": lambda: SpectralGroupNorm(2, 6, [4, 4], 16),
    "SpectralGroupNorm: activation": lambda: SpectralGroupNorm(2, 6, 3, 16, activation="tanh"),
    "SpectralGroupNorm: other samples": lambda: SpectralGroupNorm(2, 6, 3, 16)(signal[..., :12]),
    "SpectralGroupNorm: two axes": lambda: SpectralGroupNorm(2, 6, 3, 16)(signal[0]),
    "SpectralGroupNorm: integers": lambda: SpectralGroupNorm(2, 6, 3, 16)(signal.long()),
    "SpectralGroupNorm: complex x": lambda: SpectralGroupNorm(2, 6, 3, 16)(signal.to(torch.complex64)),
    "SpectralGroupNorm: a list": lambda: SpectralGroupNorm(2, 6, 3, 16)([1.0]),
    "SpectralGroupNorm: no sample of a batch": lambda: SpectralGroupNorm(2, 6, 3, 16)(signal[:0]),
    "SpectralGroupNorm: mask": lambda: SpectralGroupNorm(2, 6, 3, 16)(signal, torch.ones(2, 16)),
    "SubgraphNorm: num_parts": lambda: SubgraphNorm(2, 6, num_parts=0),
    "SubgraphNorm: no part": lambda: SubgraphNorm(2, 6)(rows),
    "SubgraphNorm: a part too large": lambda: SubgraphNorm(2, 6, num_parts=1)(rows, part),
    "SubgraphNorm: part of another size": lambda: SubgraphNorm(2, 6)(rows, part[1:]),
    "SubgraphNorm: batch of another size": lambda: SubgraphNorm(2, 6)(rows, part, graph[1:]),
    "SubgraphNorm: floating part": lambda: SubgraphNorm(2, 6)(rows, part.float()),
    "SubgraphNorm: mask": lambda: SubgraphNorm(2, 6)(rows, part, graph, torch.ones(6)),
    "SubgraphNorm: three axes": lambda: SubgraphNorm(2, 6)(x, part),
    "RegionNorm: no feature": lambda: RegionNorm(0),
    "RegionNorm: no region": lambda: RegionNorm(6, 0),
    "RegionNorm: none given": lambda: RegionNorm(6)(image),
    "RegionNorm: a region too large": lambda: RegionNorm(6, 2)(image, regions + 2),
    "RegionNorm: negative": lambda: RegionNorm(6, 2)(image, regions - 1),
    "RegionNorm: floating": lambda: RegionNorm(6, 2)(image, regions.float()),
    "RegionNorm: bool": lambda: RegionNorm(6, 2)(image, pixels),
    "RegionNorm: of one image": lambda: RegionNorm(6, 2)(image, regions[:1]),
    "RegionNorm: of another size": lambda: RegionNorm(6, 2)(image, regions[..., 1:]),
    "RegionNorm: a list": lambda: RegionNorm(6, 2)(image, [0, 1]),
    "RegionNorm: a Partition of more": lambda: RegionNorm(6, 2)(image, Partition(regions, 3)),
    "RegionNorm: mask": lambda: RegionNorm(6, 2)(image, regions, pixels[0]),
    "RegionNorm: other channels": lambda: RegionNorm(5, 2)(image, regions),
    "SensorNorm: nothing": lambda: SensorNorm([]),
    "SensorNorm: an empty one": lambda: SensorNorm([1, 0, 2]),
    "SensorNorm: two axes": lambda: SensorNorm(KIND.view(2, 3)),
    "SensorNorm: a number": lambda: SensorNorm(3),
    "SensorNorm: other channels": lambda: SensorNorm([1, 2])(image),
    "SensorNorm: mask": lambda: SensorNorm([1, 2, 3])(image, pixels),
    "DemographicNorm: no group": lambda: DemographicNorm(6, 0),
    "DemographicNorm: no feature": lambda: DemographicNorm(0, 3),
    "DemographicNorm: min_members": lambda: DemographicNorm(6, 3, min_members=1),
    "DemographicNorm: momentum": lambda: DemographicNorm(6, 3, momentum=-1),
    "DemographicNorm: no group is given": lambda: DemographicNorm(6, 3)(table),
    "DemographicNorm: a group too large": lambda: DemographicNorm(6, 1)(table, group),
    "DemographicNorm: a group below -1": lambda: DemographicNorm(6, 2)(table, group - 1),
    "DemographicNorm: floating": lambda: DemographicNorm(6, 2)(table, group.float()),
    "DemographicNorm: a list": lambda: DemographicNorm(6, 2)(table, group.tolist()),
    "DemographicNorm: of another size": lambda: DemographicNorm(6, 2)(table, group[1:]),
    "DemographicNorm: floating mask": lambda: DemographicNorm(6, 2)(table, group, torch.ones(5)),
    "DemographicNorm: mask of another size": lambda: DemographicNorm(6, 2)(table, group, torch.ones(6).bool()),
    "DemographicNorm: not trained": lambda: DemographicNorm(6, 2).eval()(table, group),
    "DemographicNorm: other features": lambda: DemographicNorm(5, 2)(table, group),
    "DemographicNorm: ok": lambda: DemographicNorm(6, 2)(table, group),
}  # fmt: skip


def _nan_weights(norm: WeightedGroupNorm) -> Any:
    with torch.no_grad():
        norm.raw_channel_weight[2] = math.nan
    return norm(image)


# --- mixtures --------------------------------------------------------------------------------------------------------


class _Gate(nn.Module):
    """A gate that says what it was told to."""

    def __init__(self, *said: Any, pair: bool = False) -> None:
        super().__init__()
        self.said = said if pair else said[0]

    def forward(self, seen: Any) -> Any:
        return self.said


BOTH = ["n c ... -> n c", "n c ... -> n"]
CASES |= {
    "Mixture: a string": lambda: Mixture("n c -> n"),
    "Mixture: nothing": lambda: Mixture([]),
    "Mixture: a number": lambda: Mixture(3),
    "Mixture: a bad pattern": lambda: Mixture(["n c -> n", "n c -> d"]),
    "Mixture: a pattern that is none": lambda: Mixture(["n c -> n", 3]),
    "Mixture: several left sides": lambda: Mixture(["n (g c) -> n g", "n c -> n"]),
    "Mixture: several masks": lambda: Mixture(["n c t -> n", "n c t, n t -> c"]),
    "Mixture: mix": lambda: Mixture(BOTH, mix="both"),
    "Mixture: center": lambda: Mixture(BOTH, center=False),
    "Mixture: scale": lambda: Mixture(BOTH, scale=False),
    "Mixture: cumulative": lambda: Mixture(BOTH, cumulative="c"),
    "Mixture: gate, a function": lambda: Mixture(BOTH, gate=3),
    "Mixture: gate, an axis": lambda: Mixture(["n (gate c) -> n gate", "n (gate c) -> n"], gate=3),
    "Mixture: an unknown name": lambda: Mixture(BOTH, d=3),
    "Mixture: affine": lambda: Mixture(BOTH, affine="c"),
    "Mixture: running without a size": lambda: Mixture(["n c -> n", "n c -> c"], track_running_stats=True),
    "Mixture: running sets of the batch": lambda: Mixture(BOTH, track_running_stats=True),
    "Mixture: momentum": lambda: Mixture(BOTH, momentum=3),
    "Mixture: no label": lambda: Mixture(["n c -> n", "n c -> kind[c]"])(rows),
    "Mixture: no label, that only the coarser reads": lambda: Mixture(["n c -> n c", "n c -> kind[c]"])(rows),
    "Mixture: an unknown label": lambda: Mixture(BOTH)(rows, kind=KIND),
    "Mixture: a label of another size": lambda: Mixture(["n c -> n", "n c -> n kind[c]"])(rows, kind=KIND[1:]),
    "Mixture: other axes": lambda: Mixture(["n c -> n", "n c -> c"])(image),
    "Mixture: a mask that no pattern has": lambda: Mixture(BOTH)(rows, torch.ones(5)),
    "Mixture: gate, two logits for three": lambda: Mixture(BOTH, gate=_Gate(torch.zeros(3)))(rows),
    "Mixture: gate, integers": lambda: Mixture(BOTH, gate=_Gate(torch.zeros(2).long()))(rows),
    "Mixture: gate, None": lambda: Mixture(BOTH, gate=_Gate(None))(rows),
    "Mixture: gate, nothing": lambda: Mixture(BOTH, gate=_Gate(pair=True))(rows),
    "Mixture: gate, a pair for results": lambda: Mixture(
        BOTH, gate=_Gate(torch.zeros(2), torch.zeros(2), pair=True), mix="results"
    )(rows),
    "Mixture: gate, three": lambda: Mixture(BOTH, gate=_Gate(*[torch.zeros(2)] * 3, pair=True))(rows),
    "Mixture: gate, a pair": lambda: Mixture(BOTH, gate=_Gate(torch.zeros(2), torch.zeros(2), pair=True))(rows),
    "Mixture: gate, of other patterns": lambda: Mixture(BOTH, gate=LearnedGate(3))(rows),
    "Mixture: moments of other sets": lambda: Mixture(BOTH)(image, moments=moments(image, "n c ... -> c")),
    "Mixture: updated without any": lambda: Mixture(BOTH).updated(moments(rows, "n c -> n c")),
    "Mixture: process_group without sharded": lambda: Mixture(BOTH, process_group="group"),
    "Mixture: sharded, no process group": lambda: Mixture(["n c -> n", "n c -> c"], sharded="n")(rows),
    "SwitchableNorm: no feature": lambda: SwitchableNorm(0),
    "SwitchableNorm: momentum": lambda: SwitchableNorm(6, momentum="0.1"),
    "SwitchableNorm: momentum, later": lambda: _with(SwitchableNorm(6), momentum=3),
    "SwitchableNorm: not trained": lambda: SwitchableNorm(6).eval()(image),
    "SwitchableNorm: other channels": lambda: SwitchableNorm(6)(x),
    "SwitchableNorm: mask of the image": lambda: SwitchableNorm(6)(image, pixels[0]),
    "SwitchableNorm: updated over ranks": lambda: SwitchableNorm(6, sharded="n").updated(moments(rows, "n c -> n c")),
    "SwitchableNorm: updated, of other sets": lambda: SwitchableNorm(6).updated(moments(rows, "n c -> n")),
    "SwitchableNorm: updated, no moments": lambda: SwitchableNorm(6).updated(rows),
    "SwitchableNorm: complex x": lambda: SwitchableNorm(6)(image.to(torch.complex64)),
    "SwitchableNorm: one value": lambda: SwitchableNorm(6)(torch.zeros(1, 6)),
    "ContextNorm: hidden": lambda: ContextNorm(2, 6, hidden=0),
    "LearnedGate: no pattern": lambda: LearnedGate(0),
    "ContextGate: no pattern": lambda: ContextGate(0),
    "ContextGate: hidden": lambda: ContextGate(2, 0),
}  # fmt: skip

# --- groups of channels ----------------------------------------------------------------------------------------------

CASES |= {
    "SoftGroupNorm: temperature": lambda: SoftGroupNorm(2, 6, temperature=0),
    "SoftGroupNorm: temperature, True": lambda: SoftGroupNorm(2, 6, temperature=True),
    "SoftGroupNorm: temperature, later": lambda: _with(SoftGroupNorm(2, 6), temperature=math.inf),
    "SoftGroupNorm: groups": lambda: SoftGroupNorm(2, 6, groups=[1, 2, 3]),
    "SoftGroupNorm: other channels": lambda: SoftGroupNorm(2, 6)(x),
    "SoftGroupNorm: mask of the image": lambda: SoftGroupNorm(2, 6)(image, pixels[0]),
    "SoftGroupNorm: NaN": lambda: _nan_logits(SoftGroupNorm(2, 6, groups=[2, 4])),
    "signatures: a list": lambda: signatures([1.0]),
    "signatures: integers": lambda: signatures(image.long()),
    "signatures: one axis": lambda: signatures(torch.zeros(3)),
    "signatures: nothing": lambda: signatures(image[:0]),
    "signatures: moments and a mask": lambda: signatures(moments(image, "n c ... -> n c"), mask=pixels),
    "signatures: moments of other sets": lambda: signatures(moments(image, "n c ... -> n")),
    "signatures: a stimulus without responses": lambda: signatures(image, torch.tensor([0, 2])),
    "signatures: stimuli of another size": lambda: signatures(image, torch.tensor([0, 1, 1])),
    "signatures: NaN": lambda: signatures(image * math.nan),
    "signatures: mask of the image": lambda: signatures(image, mask=pixels[0]),
    "correlate_channels: count": lambda: correlate_channels(image, 0),
    "correlate_channels: more groups than channels": lambda: correlate_channels(image, 7),
    "correlate_channels: one response": lambda: correlate_channels(torch.zeros(1, 6), 2),
    "correlate_channels: Inf": lambda: correlate_channels(image + math.inf, 2),
    "cluster_channels: a list": lambda: cluster_channels([1.0], 2),
    "cluster_channels: complex": lambda: cluster_channels(rows.to(torch.complex64), 2),
    "cluster_channels: one axis": lambda: cluster_channels(rows[0], 2),
    "cluster_channels: more groups than channels": lambda: cluster_channels(rows, 6),
    "regroup: another norm": lambda: regroup(nn.LocalResponseNorm(2), Partition(KIND)),
    "regroup: a list": lambda: regroup(nn.GroupNorm(2, 6), [1, 5]),
    "regroup: another size": lambda: regroup(nn.GroupNorm(2, 6), KIND[1:]),
    "regroup: an empty group": lambda: regroup(nn.GroupNorm(2, 6), Partition(KIND, 4)),
    "groups_by_depth: a number": lambda: groups_by_depth(3, 1, 2),
    "groups_by_depth: nothing": lambda: groups_by_depth([], 1, 2),
    "groups_by_depth: a model without norms": lambda: groups_by_depth(nn.Linear(3, 3), 1, 2),
    "groups_by_depth: first": lambda: groups_by_depth([8], 0, 2),
    "groups_by_depth: channels": lambda: groups_by_depth({"a": 8.0}, 1, 2),
    "Transition: steps": lambda: Transition(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), 0),
    "advance: no model": lambda: advance([]),
    "finish: no transition": lambda: finish(nn.Linear(3, 3)),
    "finish: too early": lambda: finish(Transition(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), 3)),
    "Spec: a number": lambda: Spec.parse(3),
    "Spec: read": lambda: Spec.parse("n c -> n").read("c -> n", "affine"),
    "Spec: read, another option": lambda: Spec.parse("n c -> n").read("d", "conditional"),
}


def _nan_logits(norm: SoftGroupNorm) -> Any:
    with torch.no_grad():
        norm.logits[2] = math.nan
    return norm.harden()


def cases_of_extras() -> Cases:
    """The cases of graphs, mel filters and clusters: they need torch-geometric, torchaudio and scikit-learn."""
    from torch_geometric.data import Batch, Data

    from flexnorm import graphs

    data = Batch.from_data_list([Data(x=rows[:2]), Data(x=rows[2:])])
    cases: Cases = _Cases()
    cases |= {
        "partition: of": lambda: graphs.partition(data, "faces"),
        "partition: a tensor": lambda: graphs.partition(graph),
        "partition: ok": lambda: graphs.partition(data),
        "LayerNorm: mode": lambda: graphs.LayerNorm(6, mode="edge"),
        "HeteroLayerNorm: mode": lambda: graphs.HeteroLayerNorm(6, 3, mode="graph"),
        "BatchNorm: one node": lambda: graphs.BatchNorm(6)(rows[:1]),
        "BatchNorm: one node, allowed": lambda: graphs.BatchNorm(6, allow_single_element=True)(rows[:1]),
        "BatchNorm: one node, allowed without statistics": lambda: graphs.BatchNorm(
            6, track_running_stats=False, allow_single_element=True
        ),
        "BatchNorm: momentum": lambda: graphs.BatchNorm(6, momentum=3),
        "BatchNorm: other channels": lambda: graphs.BatchNorm(5)(rows),
        "InstanceNorm: momentum": lambda: graphs.InstanceNorm(6, momentum=3, track_running_stats=True),
        "InstanceNorm: affine, other channels": lambda: graphs.InstanceNorm(5, affine=True)(rows),
        "GraphNorm: other channels": lambda: graphs.GraphNorm(5)(rows, graph),
        "GraphGroupNorm: groups that do not divide": lambda: graphs.GraphGroupNorm(4, 6),
        "GraphGroupNorm: no group": lambda: graphs.GraphGroupNorm(0, 6),
        "NodeGroupNorm: groups that do not divide": lambda: graphs.NodeGroupNorm(4, 6),
        "NodeGroupNorm: other channels": lambda: graphs.NodeGroupNorm(2, 4)(rows),
        "FeatureGroupNorm: no groups": lambda: graphs.FeatureGroupNorm(6)(rows),
        "FeatureGroupNorm: of another size": lambda: graphs.FeatureGroupNorm(6)(rows, groups=graph[1:]),
        "FeatureGroupNorm: a list": lambda: graphs.FeatureGroupNorm(6)(rows, groups=[0, 1]),
        "FeatureGroupNorm: static, and given at the call": lambda: graphs.FeatureGroupNorm(6, groups=graph)(
            rows, groups=graph
        ),
        "FeatureGroupNorm: static, other nodes": lambda: graphs.FeatureGroupNorm(6, groups=graph)(rows[1:]),
        "FeatureGroupNorm: from around, of another size": lambda: _given(
            graphs.FeatureGroupNorm(6), rows, groups=graph[1:]
        ),
        "FeatureGroupNorm: affine, other channels": lambda: graphs.FeatureGroupNorm(5)(rows, graph),
        "HeteroLayerNorm: no types": lambda: graphs.HeteroLayerNorm(6, 3)(rows),
        "HeteroLayerNorm: no types and no parameters": lambda: graphs.HeteroLayerNorm(6, 3, affine=False)(rows),
        "HeteroLayerNorm: a type too large": lambda: graphs.HeteroLayerNorm(6, 1)(rows, part),
        "HeteroLayerNorm: type_ptr": lambda: graphs.HeteroLayerNorm(6, 2)(rows, type_ptr=[0, 2, 5]),
        "HeteroLayerNorm: type_ptr that falls": lambda: graphs.HeteroLayerNorm(6, 2)(rows, type_ptr=[0, 6, 5]),
        "HeteroLayerNorm: type_ptr of fewer rows": lambda: graphs.HeteroLayerNorm(6, 2)(rows, type_ptr=[0, 2, 4]),
        "HeteroLayerNorm: type_ptr of more types": lambda: graphs.HeteroLayerNorm(6, 2)(rows, type_ptr=[0, 2, 3, 5]),
        "HeteroBatchNorm: no types": lambda: graphs.HeteroBatchNorm(6, 3)(rows),
        "HeteroBatchNorm: a type too large": lambda: graphs.HeteroBatchNorm(6, 1)(rows, part),
        "HeteroBatchNorm: floating": lambda: graphs.HeteroBatchNorm(6, 2)(rows, part.float()),
        "HeteroBatchNorm: no type": lambda: graphs.HeteroBatchNorm(6, 0),
        "cluster_channels: equal signatures": lambda: cluster_channels(rows, 2),
        "cluster_channels: equal signatures, one stimulus": lambda: cluster_channels(table[:, :1], 2),
        "cluster_channels: ok": lambda: cluster_channels(table.sin(), 2),
        "correlate_channels: ok": lambda: correlate_channels(table.sin(), 6),
        "mel_bands: ok": lambda: mel_bands(201, 8, 16000),
        "mel_bands: too many": lambda: mel_bands(9, 8, 16000),
        "hz_bands: mels": lambda: hz_bands([300, 1000], sample_rate=16000, n_mels=80),
        "hz_bands: n_mels": lambda: hz_bands([300], sample_rate=16000, n_mels=0),
        "hz_bands: n_mels, too many": lambda: hz_bands([300], sample_rate=4000, n_mels=2000),
        "hz_bands: mels, edges outside": lambda: hz_bands([300, 5000], sample_rate=16000, n_mels=80, f_max=4000),
        "hz_bands: mels, edges too near": lambda: hz_bands([300, 301], sample_rate=16000, n_mels=80),
        "hz_bands: mels, mel_scale": lambda: hz_bands([300], sample_rate=16000, n_mels=80, mel_scale="bark"),
    }
    batches: dict[str, tuple[Any, ...]] = {
        "none": (),
        "ok": (graph,),
        "int32 and its number": (graph.int(), 3),
        "a Partition": (Partition(graph),),
        "a Partition and its number": (Partition(graph), 2),
        "a Partition and another number": (Partition(graph), 3),
        "a Partition of another size": (Partition(graph[1:]),),
        "of another size": (graph[1:],),
        "two axes": (graph[:, None],),
        "a list": (graph.tolist(),),
        "floating": (graph.float(),),
        "bool": (graph.bool(),),
        "negative": (graph - 1,),
        "above its number": (graph, 1),
        "a number that is none": (graph, 2.0),
        "a negative number": (graph, -1),
        "meta": (graph.to("meta"), 2),
    }
    for name, args in batches.items():
        cases |= {
            f"GraphGroupNorm, batch: {name}": lambda args=args: graphs.GraphGroupNorm(2, 6)(rows, *args),
            f"GraphNorm, batch: {name}": lambda args=args: graphs.GraphNorm(6)(rows, *args),
            f"MeanSubtractionNorm, batch: {name}": lambda args=args: graphs.MeanSubtractionNorm()(rows, *args),
        }
        if args and isinstance(args[0], torch.Tensor | Partition):
            cases[f"given, batch: {name}"] = lambda args=args: _given(graphs.GraphNorm(6), rows, batch=args[0])
    return cases
