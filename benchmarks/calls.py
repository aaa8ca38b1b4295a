"""What a call costs: tiny inputs, a new shape at every call, a new batch of graphs at every step. One thread.

The process is as `python train.py` has it: no environment variable changes its allocator or its threads.
"""

from __future__ import annotations

import datetime
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm import Norm, Partition
from flexnorm.images import ChannelGroupNorm
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm

from . import compiled, gate, machine, report
from .case import Case, Contender, Data, like, randn
from .cases import CASES
from .cases.graphs import CLASSES, by_sizes, class_case
from .cases.sequences import lengths
from .cases.spectrograms import MEL
from .measure import Sample, bootstrap, copier, interleaved, median, paired, step

PATH = report.RESULTS / "calls.json"
CHANNELS, GROUPS = 48, 8
ONE_SHAPE = "flexnorm, one shape"

SHOWN = [
    ("ChannelGroupNorm 2x32x8x8", "forward+backward"),
    ("layer norm, sentences of 5 to 60 tokens", "forward"),
    ("PyG GraphNorm, 24 graphs x48, four layers", "forward+backward"),
]


@dataclass(frozen=True)
class Settings:
    """`warm` inputs come first, then `steps` others are timed. Rows of stacks may end after so many `seconds`.

    Rounds of changing shapes have `alike` steps, so that all rounds have about the same sizes. Other rounds have 4.
    """

    steps: int = 512
    warm: int = 8
    alike: int = 32
    seconds: float = 1.0
    compile: bool = True


QUICK = Settings(steps=40, warm=2, alike=4, seconds=0.05, compile=False)


@dataclass(frozen=True)
class Target:
    """Limits of flexnorm's time over the time of the other side."""

    must: float
    reach: float


Buffers = Sequence[Data]
Errors = dict[str, dict[str, Any]]


def _timed(
    sides: Mapping[str, tuple[Contender, Buffers]], mode: str, warm: int, steps: int = 4, seconds: float = math.inf
) -> dict[str, list[Sample]]:
    """Samples of every side in every round of so many steps. The first buffers of a side warm it up.

    The side "copy" copies tensors of the same shapes, which are its own.
    """
    with torch.set_grad_enabled(mode != "forward"):
        runs = {name: [step(contender, data, mode) for data in buffers] for name, (contender, buffers) in sides.items()}
        buffers = sides["flexnorm"][1]
        copies = {id(data): copier([Data(x=data.x.detach().clone())]) for data in buffers}
        runs["copy"] = [copies[id(data)] for data in buffers]
        for calls in runs.values():
            for call in calls[:warm]:
                call()
        return interleaved({name: calls[warm:] for name, calls in runs.items()}, steps, seconds)


def _row(
    case: str, mode: str, times: Mapping[str, list[Sample]], peers: Sequence[str], target: Target, errors: Errors
) -> dict[str, Any]:
    """flexnorm's time over the time of the fastest peer. The side "control" repeats the calls of another side."""
    us = {name: 1e6 * median(s.seconds for s in samples) for name, samples in times.items()}
    faults = {name: median(s.faults for s in samples) for name, samples in times.items()}
    best = min(peers, key=us.__getitem__)
    wrong = {name: gate.worst(found, mode) for name, found in errors.items()}
    return {
        "case": case,
        "mode": mode,
        "microseconds": us["flexnorm"],
        "best": best,
        "best_microseconds": us[best],
        "faults": faults["flexnorm"],
        "best_faults": faults[best],
        "copy_microseconds": us["copy"],
        "cost": asdict(bootstrap(paired(times["flexnorm"], times[best]))),
        "control": asdict(bootstrap(paired(times["control"], times[ONE_SHAPE if ONE_SHAPE in times else best]))),
        "must": target.must,
        "reach": target.reach,
        "error": wrong["flexnorm"],
        "best_error": wrong.get(best),
        "rounds": len(times["flexnorm"]),
        "peers": {name: us[name] for name in peers},
    }


# --- one tiny shape --------------------------------------------------------------------------------------------------


def _layered(layer: nn.Module, data: Data, generator: torch.Generator) -> Data:
    """The same data and a layer. All contenders read the weight and bias of the layer."""
    for parameter, mean in ((layer.weight, 1.0), (layer.bias, 0.0)):
        nn.init.normal_(parameter, mean, 0.2, generator=generator)
    return like(data, layer=layer, weight=layer.weight, bias=layer.bias)


def _tiny() -> Case:
    def make(scale: float, generator: torch.Generator) -> Data:
        x = randn((2, 32, 8, 8), generator)
        data = _layered(ChannelGroupNorm(8, 32), Data(x=x, over=(32, 1, 1), valid=None, groups=8), generator)
        data.theirs = nn.GroupNorm(8, 32)
        data.theirs.load_state_dict(data.layer.state_dict())
        return data

    return replace(
        _known("group norm 16x256x56x56"),
        name=SHOWN[0][0],
        make=make,
        ours=lambda d: d.layer(d.x),
        peers=[Contender("nn.GroupNorm", lambda d: d.theirs(d.x), module="theirs")],
    )


TINY_TARGETS = {
    "forward": Target(1.3, 1.0),
    "forward with grad": Target(1.6, 1.0),
    "forward+backward": Target(1.5, 1.15),
}


def _tiny_rows(settings: Settings) -> Iterator[dict[str, Any]]:
    case = _tiny()
    peer = case.peers[0]
    errors = gate.errors(case, [case.contender, peer], 1.0, "cpu")
    first = case.draw()
    for mode, target in TINY_TARGETS.items():
        few = [like(first, x=torch.randn_like(first.x).requires_grad_(mode != "forward")) for _ in range(8)]
        buffers = list(islice(cycle(few), settings.warm + 4 * settings.steps))
        sides = {"flexnorm": (case.contender, buffers), peer.name: (peer, buffers), "control": (peer, buffers)}
        yield _row(case.name, mode, _timed(sides, mode, settings.warm), [peer.name], target, errors)


# --- a new shape at every call ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Inputs whose shapes are drawn from `shapes`, each at most once.

    The float64 reference and the peers are those of the case `known`. The stream has a row against the peers if `peer`
    is a target.
    """

    name: str
    known: str
    layer: Callable[[], nn.Module]
    shapes: Sequence[tuple[int, ...]]
    make: Callable[[Tensor, torch.Generator], Data]
    call: Callable[[Data], Tensor] = lambda d: d.layer(d.x)
    peer: Target | None = None

    @property
    def case(self) -> Case:
        """The gate reads this case. Scale 0 is the smallest shape, scale 1 is the largest shape."""
        ordered = sorted(self.shapes, key=_volume)

        def make(scale: float, generator: torch.Generator) -> Data:
            shape = ordered[round(scale * (len(ordered) - 1))]
            return _layered(self.layer(), self.make(randn(shape, generator), generator), generator)

        # the peers that gather the valid tokens read indices that are made before the clock starts
        peers = [peer for peer in _known(self.known).peers if "valid" not in peer.name] if self.peer else []
        return replace(_known(self.known), name=self.name, make=make, ours=self.call, peers=peers)

    def draw(self, shapes: Sequence[tuple[int, ...]], first: Data, generator: torch.Generator) -> list[Data]:
        made = [self.make(randn(shape, generator), generator) for shape in shapes]
        return [Data(**{**vars(first), **vars(data)}) for data in made]


def _volume(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _planes(x: Tensor, generator: torch.Generator) -> Data:
    return Data(x=x, over=(CHANNELS, 1, 1), valid=None, groups=GROUPS)


def _planes_last(x: Tensor, generator: torch.Generator) -> Data:
    return _planes(x.contiguous(memory_format=torch.channels_last), generator)


def _utterances(x: Tensor, generator: torch.Generator) -> Data:
    mask = torch.arange(x.shape[2]) < lengths(x.shape[0], x.shape[2], generator).unsqueeze(1)
    return Data(x=x, over=(CHANNELS, 1), valid=mask.unsqueeze(1), mask=mask, groups=GROUPS)


def _sentences(x: Tensor, generator: torch.Generator) -> Data:
    mask = torch.arange(x.shape[1]) < lengths(x.shape[0], x.shape[1], generator).unsqueeze(1)
    valid = mask.unsqueeze(2)
    return Data(x=x, over=(CHANNELS,), valid=valid, outside=~valid, mask=mask, groups=GROUPS)


def _tokens(x: Tensor, generator: torch.Generator) -> Data:
    return Data(x=x, over=(CHANNELS,), valid=None)


def _bands(x: Tensor, generator: torch.Generator) -> Data:
    return Data(x=x, over=(x.shape[2], 1), valid=None, sizes=MEL)


def _band_norm() -> Norm:
    return Norm("n c f t -> n c band[f]", affine="f", f=sum(MEL), band=Partition.from_sizes(MEL))


SIDES = [(h, w) for h in range(5, 73) for w in range(5, 73) if 61 <= h * w <= 360]
PLANES = [(2, CHANNELS, h, w) for h, w in SIDES]
SENTENCES = [(n, t, CHANNELS) for n in range(8, 25) for t in range(5, 61)]
FRAMES = range(50, 751)  # 50 a second: 1 to 15 s

STREAMS = [
    Stream(
        "group norm, planes of 61 to 360",
        "group norm 16x256x56x56",
        lambda: ChannelGroupNorm(GROUPS, CHANNELS),
        PLANES,
        _planes,
        peer=Target(1.3, 1.0),
    ),
    Stream(
        "group norm, planes of 61 to 360, channels_last",
        "group norm 16x256x56x56 channels_last",
        lambda: ChannelGroupNorm(GROUPS, CHANNELS),
        PLANES,
        _planes_last,
    ),
    Stream(
        "masked utterances of 1 to 15 s",
        "masked utterances, 32 groups 8x512x15999",
        lambda: SequenceGroupNorm(GROUPS, CHANNELS),
        [(2, CHANNELS, t) for t in FRAMES],
        _utterances,
        lambda d: d.layer(d.x, d.mask),
    ),
    Stream(
        "masked tokens, sentences of 5 to 60 tokens",
        "masked tokens, group norm 32x512x768",
        lambda: TokenGroupNorm(GROUPS, CHANNELS),
        SENTENCES,
        _sentences,
        lambda d: d.layer(d.x, d.mask),
        peer=Target(1.0, 0.5),
    ),
    Stream(
        SHOWN[1][0],
        "layer norm 32x512x768",
        lambda: Norm("... c -> ...", affine="c", c=CHANNELS),
        SENTENCES,
        _tokens,
        peer=Target(1.4, 1.0),
    ),
    Stream(
        "bands, spectrograms of 1 to 15 s",
        "8 unequal bands 32x4x80x1000",
        _band_norm,
        [(2, 1, sum(MEL), t) for t in FRAMES],
        _bands,
    ),
]
NEW_TARGET = Target(1.7, 1.2)


def _stream_rows(stream: Stream, settings: Settings, note: list[str]) -> Iterator[dict[str, Any]]:
    """One measurement, two rows: against the layer's own calls of one shape, and against the best peer.

    Every side has tensors of its own, and every call reads tensors that no call has read before.
    """
    case = stream.case
    first = case.draw(0.5)
    generator = torch.Generator().manual_seed(zlib.crc32(stream.name.encode()))
    order = torch.randperm(len(stream.shapes), generator=generator).tolist()
    drawn = [stream.shapes[i] for i in order[: settings.warm + settings.steps]]
    mean = sum(map(_volume, drawn)) / len(drawn)
    one = [min(stream.shapes, key=lambda shape: abs(_volume(shape) - mean))] * len(drawn)
    fresh = stream.draw(drawn, first, generator)
    peers = list(case.peers)
    for peer in [peer for peer in peers if peer.formula and settings.compile]:
        fast = compiled.compiled(peer, dynamic=True)
        why = compiled.ready(fast, *fresh[: settings.warm], modes=["forward"])
        if why is None:
            peers.append(fast)
        else:
            note.append(f"{stream.name}: {fast.name}: {why}")
    errors: Errors = {}
    for scale in (0.0, 0.5, 1.0):
        for name, found in gate.errors(case, [case.contender, *peers], scale, "cpu").items():
            errors.setdefault(name, {}).update({f"{key}, scale {scale:g}": value for key, value in found.items()})
    sides = {"flexnorm": (case.contender, fresh)}
    sides |= {peer.name: (peer, [like(data, x=torch.clone(data.x)) for data in fresh]) for peer in peers}
    sides |= {name: (case.contender, stream.draw(one, first, generator)) for name in (ONE_SHAPE, "control")}
    graphs = _compiled_graphs()
    times = _timed(sides, "forward", settings.warm, settings.alike)
    if _compiled_graphs() != graphs:
        note.append(f"{stream.name}: torch.compile compiled again while it was timed")
    yield _row(stream.name, "forward", times, [ONE_SHAPE], NEW_TARGET, errors)
    if stream.peer is not None:
        yield _row(stream.name, "forward", times, [peer.name for peer in peers], stream.peer, errors)


def _compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# --- fresh batch vectors ---------------------------------------------------------------------------------------------

WAYS = [
    (f"24 graphs x{CHANNELS}, layer one alone", 24, 1),
    (f"24 graphs x{CHANNELS}, four layers", 24, 4),
    (f"96 graphs x{CHANNELS}, four layers", 96, 4),
]
"""How many graphs a batch has, and how many layers read its batch vector."""


def _graph_targets(name: str) -> dict[str, Target]:
    must = 1.1 if name in ("GraphSizeNorm", "BatchNorm") else 1.0
    return {"forward": Target(must, 0.5), "forward+backward": Target(must, 0.4)}


def _molecules(count: int) -> Callable[[float, torch.Generator], Data]:
    def make(scale: float, generator: torch.Generator) -> Data:
        made = by_sizes(torch.randint(8, 41, (count,), generator=generator).tolist(), CHANNELS, generator)
        made.dy = randn(made.x.shape, generator)
        return made

    return make


def _graph_rows(title: str, count: int, layers: int, settings: Settings) -> Iterator[dict[str, Any]]:
    """The batch vector is a new tensor at every step, and the classes do not get the number of graphs.

    The gate looks at one layer.
    """
    generator = torch.Generator().manual_seed(count)
    fresh = [_molecules(count)(1.0, generator) for _ in range(settings.warm + settings.steps)]
    seconds = math.inf if layers == 1 else settings.seconds
    for name in CLASSES:
        case = class_case(name, _molecules(count), layers=layers, counted=False)
        alone = class_case(name, _molecules(count), counted=False)
        peer = case.peers[0]
        errors = gate.errors(alone, [alone.contender, alone.peers[0]], 1.0, "cpu")
        first = case.draw()
        for mode, target in _graph_targets(name).items():
            buffers = [
                like(first, x=data.x.detach().requires_grad_(mode != "forward"), ids=data.ids.clone(), dy=data.dy)
                for data in fresh
            ]
            sides = {"flexnorm": (case.contender, buffers), peer.name: (peer, buffers), "control": (peer, buffers)}
            times = _timed(sides, mode, settings.warm, seconds=seconds)
            yield _row(f"PyG {name}, {title}", mode, times, [peer.name], target, errors)


# --- all of them -----------------------------------------------------------------------------------------------------


def _known(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def measured(settings: Settings, note: list[str]) -> Iterator[dict[str, Any]]:
    yield from _tiny_rows(settings)
    for stream in STREAMS:
        yield from _stream_rows(stream, settings, note)
        torch._dynamo.reset()
    if find_spec("torch_geometric") is None:
        note.append("PyG's classes (torch_geometric is not there)")
        return
    for title, count, layers in WAYS:
        yield from _graph_rows(title, count, layers, settings)


def shown(row: dict[str, Any]) -> bool:
    """Whether the README has the row. Of the two rows of a stream, the README has the row against the best peer."""
    return (row["case"], row["mode"]) in SHOWN and row["best"] != ONE_SHAPE


def measure(path: Path, *, quick: bool = False) -> int:
    """Prints and writes the rows. 1 if a result of flexnorm is wrong."""
    machine.plain()
    began = time.monotonic()
    torch.set_num_threads(1)
    results: report.Results = {
        "machine": machine.described("cpu"),
        "versions": machine.versions(),
        "settings": {"device": "cpu", "threads": 1, "date": datetime.date.today().isoformat()},
        "rows": [],
        "missing": [],
    }
    print(report.setting(results))
    for row in measured(QUICK if quick else Settings(), results["missing"]):
        results["rows"].append({**row, "shown": shown(row)})
        print(report.call_line(row), flush=True)
    results["settings"]["seconds"] = time.monotonic() - began
    return report.finish(results, path)
