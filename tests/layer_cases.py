"""Every public layer class in the configurations that have a state of their own: name -> how the layer is built."""

from collections.abc import Callable

import torch
from torch import nn

from flexnorm import Norm, Partition
from flexnorm.conversion import SyncBatchNorm
from flexnorm.description import UnitOffsetNorm
from flexnorm.grouping import SoftGroupNorm
from flexnorm.images import ChannelGroupNorm
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
from flexnorm.sequences import SequenceGroupNorm, TokenGroupNorm
from flexnorm.spectrograms import CepstralNorm, MelBandNorm
from flexnorm.successors import ChannelAffine, NormAct
from flexnorm.transition import Transition

KIND = torch.tensor([0, 1, 1, 0, 2, 2])
IMAGES = "n c ..., n ..."

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Norm, no parameters": lambda: Norm("n (g c) ... -> n g", g=2),
    "Norm, affine": lambda: Norm("n (g c) ... -> n g", affine="(g c)", g=2, sizes={"(g c)": 6}),
    "Norm, affine over two axes": lambda: Norm("n (g c) ... -> n g", affine="g c", g=2, c=3),
    "Norm, bias=False": lambda: Norm("n c -> n", affine="c", c=6, bias=False),
    "Norm, center=False": lambda: Norm("... c -> ...", affine="c", c=6, center=False, bias=False),
    "Norm, dtype": lambda: Norm("n c -> c", affine="c", c=6, track_running_stats=True, dtype=torch.float64),
    "Norm, complex": lambda: Norm("n c -> c", affine="c", c=6, track_running_stats=True, dtype=torch.complex64),
    "Norm, meta": lambda: Norm("n c -> kind[c]", affine="c", c=6, kind=KIND, device="meta"),
    "Norm, conditional": lambda: Norm("b c t -> b", affine="c", conditional="b c", c=6),
    "Norm, conditional alone": lambda: Norm("b c t -> b", conditional="b c"),
    "Norm, mask": lambda: Norm("b t (g c), b t -> b t g", affine="(g c)", g=2, c=3),
    "Norm, label of every call": lambda: Norm("v c -> graph[v] c", affine="c", c=6),
    "Norm, parameters of a label": lambda: Norm("v c -> type[v] c", affine="type[v] c", c=6, type=4),
    "Norm, static label": lambda: Norm("n c ... -> n kind[c]", affine="c", c=6, kind=KIND),
    "Norm, static Partition": lambda: Norm("n c -> n kind[c]", kind=Partition.from_sizes([2, 0, 4])),
    "Norm, static label of two axes": lambda: Norm("n h w -> n region[h w]", region=KIND.view(2, 3)),
    "Norm, two static labels": lambda: Norm("n c t -> a[c] b[t]", a=KIND, b=torch.tensor([0, 0, 1])),
    "Norm, static label named as an option": lambda: Norm("n c -> n mask[c]", labels={"mask": KIND}),
    "Norm, parameters of a static label": lambda: Norm("n c -> n", affine="kind[c]", kind=KIND),
    "Norm, running": lambda: Norm("n c ... -> c", affine="c", c=6, track_running_stats=True),
    "Norm, running, momentum=None": lambda: Norm("n c -> c", c=6, track_running_stats=True, momentum=None),
    "Norm, running of a label": lambda: Norm("v c -> type[v] c", c=6, type=4, track_running_stats=True),
    "Norm, running of a label, momentum=None": lambda: Norm(
        "v c -> type[v] c", c=6, type=4, track_running_stats=True, momentum=None
    ),
    "Norm, running of a static label": lambda: Norm(
        "n c -> kind[c]", affine="c", c=6, kind=KIND, track_running_stats=True
    ),
    "Norm, running of a static label, momentum=None": lambda: Norm(
        "n c -> kind[c]", kind=KIND, track_running_stats=True, momentum=None
    ),
    "Norm, running, conditional": lambda: Norm(
        "n c t -> c", affine="c", conditional="n c", c=6, track_running_stats=True
    ),
    "Norm, running of a composition": lambda: Norm("n (g c) -> (g c)", g=2, c=3, track_running_stats=True),
    "Norm, cumulative": lambda: Norm("b c t -> b", affine="c", c=6, cumulative="t"),
    "Norm, sharded": lambda: Norm("n c ... -> c", affine="c", c=6, sharded="n", track_running_stats=True),
    "UnitOffsetNorm": lambda: UnitOffsetNorm("... c -> ...", affine="c", c=6, center=False, bias=False),
    "SyncBatchNorm": lambda: SyncBatchNorm(6),
    "SyncBatchNorm, momentum=None, affine=False": lambda: SyncBatchNorm(6, momentum=None, affine=False),
    "SyncBatchNorm, track_running_stats=False": lambda: SyncBatchNorm(6, track_running_stats=False),
    "ChannelGroupNorm": lambda: ChannelGroupNorm(2, 6),
    "ChannelGroupNorm, affine=False": lambda: ChannelGroupNorm(2, 6, affine=False),
    "ChannelGroupNorm, bias=False, zero_init": lambda: ChannelGroupNorm(2, 6, bias=False, zero_init=True),
    "ChannelGroupNorm, unequal groups": lambda: ChannelGroupNorm(3, 6, groups=[1, 2, 3]),
    "ChannelGroupNorm, groups, affine=False": lambda: ChannelGroupNorm(3, 6, affine=False, groups=KIND),
    "SoftGroupNorm": lambda: SoftGroupNorm(3, 6),
    "SoftGroupNorm, first groups, bias=False": lambda: SoftGroupNorm(3, 6, bias=False, groups=KIND),
    "TokenGroupNorm": lambda: TokenGroupNorm(2, 6),
    "TokenGroupNorm, bias=False": lambda: TokenGroupNorm(2, 6, bias=False),
    "SequenceGroupNorm": lambda: SequenceGroupNorm(2, 6),
    "SequenceGroupNorm, affine=False": lambda: SequenceGroupNorm(2, 6, affine=False, channels_last=True),
    "MelBandNorm": lambda: MelBandNorm(3, 6),
    "MelBandNorm, affine=None": lambda: MelBandNorm([1, 2, 3], affine=None),
    "MelBandNorm, channel band": lambda: MelBandNorm(3, 6, affine="channel band", num_channels=2),
    "CepstralNorm, utterance": lambda: CepstralNorm(),
    "CepstralNorm, cumulative": lambda: CepstralNorm("cumulative", 6),
    "CepstralNorm, fixed": lambda: CepstralNorm("fixed", 6),
    "WeightedGroupNorm": lambda: WeightedGroupNorm(2, 6),
    "WeightedGroupNorm, affine=False": lambda: WeightedGroupNorm(2, 6, affine=False),
    "TemporalGroupNorm, frame": lambda: TemporalGroupNorm(2, 6),
    "TemporalGroupNorm, causal": lambda: TemporalGroupNorm(2, 6, "causal"),
    "SpectralGroupNorm": lambda: SpectralGroupNorm(2, 6, 3, 8),
    "SpectralGroupNorm, affine=False": lambda: SpectralGroupNorm(6, 6, [1, 4], affine=False),
    "SubgraphNorm": lambda: SubgraphNorm(2, 6, num_parts=3),
    "RegionNorm": lambda: RegionNorm(6),
    "RegionNorm, bias=False": lambda: RegionNorm(6, 3, bias=False),
    "SensorNorm": lambda: SensorNorm([1, 2, 3]),
    "DemographicNorm": lambda: DemographicNorm(6, 3),
    "DemographicNorm, momentum=0.1, affine=False": lambda: DemographicNorm(6, 3, momentum=0.1, affine=False),
    "Mixture": lambda: Mixture([f"{IMAGES} -> n c", f"{IMAGES} -> n"], affine="c", c=6),
    "Mixture, results": lambda: Mixture([f"{IMAGES} -> n c", f"{IMAGES} -> n"], mix="results"),
    "Mixture, static label": lambda: Mixture(["n c -> n", "n c -> n kind[c]"], affine="c", c=6, kind=KIND),
    "Mixture, running of a static label": lambda: Mixture(
        ["n c -> n kind[c]", "n c -> kind[c]"], kind=KIND, track_running_stats=True, momentum=None
    ),
    "Mixture, gate": lambda: Mixture(["n c -> n", "n c -> c"], gate=ContextGate(2)),
    "SwitchableNorm": lambda: SwitchableNorm(6),
    "SwitchableNorm, track_running_stats=False": lambda: SwitchableNorm(6, affine=False, track_running_stats=False),
    "DualNorm": lambda: DualNorm(2, 6),
    "ContextNorm": lambda: ContextNorm(2, 6),
    "ContextNorm, hidden=None": lambda: ContextNorm(2, 6, hidden=None, bias=False),
    "LearnedGate": lambda: LearnedGate(3),
    "LearnedGate, separate=False": lambda: LearnedGate(3, separate=False),
    "ContextGate": lambda: ContextGate(3),
    "ContextGate, hidden=None": lambda: ContextGate(3, None, separate=False),
    "ChannelAffine": lambda: ChannelAffine(6),
    "NormAct": lambda: NormAct({"norm": ChannelGroupNorm(2, 6), "act": nn.SiLU()}),
    "Transition": lambda: Transition(nn.BatchNorm2d(6), ChannelGroupNorm(2, 6), steps=10),
}


def layers_of_graphs() -> dict[str, Callable[[], nn.Module]]:
    """The layers that need PyTorch Geometric."""
    from flexnorm import graphs

    return {
        "BatchNorm": lambda: graphs.BatchNorm(6),
        "BatchNorm, momentum=None, affine=False": lambda: graphs.BatchNorm(6, momentum=None, affine=False),
        "FeatureGroupNorm": lambda: graphs.FeatureGroupNorm(6),
        "FeatureGroupNorm, groups": lambda: graphs.FeatureGroupNorm(6, groups=KIND),
        "GraphGroupNorm": lambda: graphs.GraphGroupNorm(2, 6),
        "GraphGroupNorm, affine=False": lambda: graphs.GraphGroupNorm(2, 6, affine=False),
        "GraphNorm": lambda: graphs.GraphNorm(6),
        "GraphSizeNorm": lambda: graphs.GraphSizeNorm(),
        "HeteroBatchNorm": lambda: graphs.HeteroBatchNorm(6, 3),
        "HeteroBatchNorm, momentum=None": lambda: graphs.HeteroBatchNorm(6, 3, momentum=None),
        "HeteroLayerNorm": lambda: graphs.HeteroLayerNorm(6, 3),
        "HeteroLayerNorm, affine=False": lambda: graphs.HeteroLayerNorm(6, 3, affine=False),
        "InstanceNorm": lambda: graphs.InstanceNorm(6),
        "InstanceNorm, affine, running": lambda: graphs.InstanceNorm(6, affine=True, track_running_stats=True),
        "LayerNorm": lambda: graphs.LayerNorm(6),
        "LayerNorm, node, affine=False": lambda: graphs.LayerNorm(6, affine=False, mode="node"),
        "MeanSubtractionNorm": lambda: graphs.MeanSubtractionNorm(),
        "NodeGroupNorm": lambda: graphs.NodeGroupNorm(2, 6),
        "PairNorm": lambda: graphs.PairNorm(),
    }
