"""Models and state dicts as they were pickled at commit cda8e28, with inputs and results.

    git worktree add ../old cda8e28
    PYTHONPATH=../old python tests/golden/make_pickles.py

writes them: once, with the library of that commit. They stay as they are, because models of users were pickled so.
`test_pickles.py` loads them with the library of today.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm import Moments, Norm, Partition, moments
from flexnorm.conversion import SyncBatchNorm
from flexnorm.description import UnitOffsetNorm
from flexnorm.grouping import SoftGroupNorm
from flexnorm.images import ChannelGroupNorm
from flexnorm.mixtures import ContextNorm, DualNorm, Mixture, SwitchableNorm
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

HERE = pathlib.Path(__file__).resolve().parent
COMMIT = "cda8e28"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

KIND = torch.tensor([0, 1, 1, 0, 2, 2])
NODES = torch.tensor([0, 2, 2, 0, 3, 0, 2, 3])  # unsorted; group 1 is empty

Call = tuple[tuple[Any, ...], dict[str, Any]]


def model() -> nn.ModuleDict:
    """One of each layer that needs no extra, as it is built."""
    left = "n c ..., n ..."
    return nn.ModuleDict(
        {
            "norm": Norm("n (g c) ... -> n g", affine="(g c)", g=2, sizes={"(g c)": 6}),
            "norm_rms": Norm("... c -> ...", affine="c", c=6, center=False, bias=False, activation="silu", eps=1e-3),
            "norm_masked": Norm("b t (g c), b t -> b t g", affine="g c", g=2, c=3),
            "norm_static": Norm("n c ... -> n kind[c]", affine="c", c=6, kind=KIND),
            "norm_static_partition": Norm("n c -> n kind[c]", affine="kind[c]", kind=Partition.from_sizes([2, 0, 4])),
            "norm_label": Norm("v c -> graph[v] c", affine="c", c=6),
            "norm_label_counted": Norm("v c -> graph[v] c", affine="graph[v] c", c=6, graph=4),
            "norm_conditional": Norm("b c t -> b", affine="c", conditional="b c", c=6),
            "norm_running": Norm("n c ... -> c", affine="c", c=6, track_running_stats=True),
            "norm_running_average": Norm("n c ... -> c", c=6, track_running_stats=True, momentum=None),
            "norm_running_label": Norm("v c -> graph[v] c", c=6, graph=4, track_running_stats=True, momentum=None),
            "norm_running_static": Norm("n c -> kind[c]", affine="c", c=6, kind=KIND, track_running_stats=True),
            "norm_cumulative": Norm("b c t -> b", affine="c", c=6, cumulative="t"),
            "norm_complex": Norm("n c -> c", affine="c", c=6, track_running_stats=True, dtype=torch.complex64),
            "norm_unit_offset": UnitOffsetNorm("... c -> ...", affine="c", c=6, center=False, bias=False),
            "sync_batch": SyncBatchNorm(6),
            "channel_group": ChannelGroupNorm(2, 6, zero_init=True),
            "channel_group_unequal": ChannelGroupNorm(3, 6, groups=[1, 2, 3], activation="relu"),
            "channel_group_rewritten": ChannelGroupNorm(3, 6, groups=[1, 2, 3]),
            "soft_group": SoftGroupNorm(3, 6, groups=KIND),
            "token_group": TokenGroupNorm(2, 6),
            "sequence_group": SequenceGroupNorm(2, 6),
            "sequence_group_packed": SequenceGroupNorm(2, 6, channels_last=True),
            "mel_band": MelBandNorm(3, 6),
            "mel_band_channel": MelBandNorm([1, 2, 3], affine="channel band", num_channels=2),
            "cepstral": CepstralNorm("fixed", 6),
            "cepstral_cumulative": CepstralNorm(
                "cumulative", 6, eps=0.1
            ),  # of 2 frames, a small eps multiplies rounding
            "weighted_group": WeightedGroupNorm(2, 6),
            "temporal_group": TemporalGroupNorm(2, 6, "causal"),
            "spectral_group": SpectralGroupNorm(2, 6, 3, 16),
            "subgraph": SubgraphNorm(2, 6),
            "region": RegionNorm(6),
            "sensor": SensorNorm([1, 2, 3]),
            "demographic": DemographicNorm(6, 3),
            "mixture": Mixture(["n c -> n", "n c -> n kind[c]"], affine="c", c=6, kind=KIND),
            "mixture_running": Mixture(
                [f"{left} -> n c", f"{left} -> c"], affine="c", c=6, mix="results", track_running_stats=True
            ),
            "switchable": SwitchableNorm(6),
            "dual": DualNorm(2, 6),
            "context": ContextNorm(2, 6),
            "transition": Transition(nn.BatchNorm2d(6), ChannelGroupNorm(2, 6), steps=10),
            "channel_affine": ChannelAffine(6),
            "norm_act": NormAct({"norm": ChannelGroupNorm(3, 6), "act": nn.Hardswish()}),
        }
    )


def calls() -> dict[str, Call]:
    """What each of these layers is called with: x first."""
    image, rows, sequence = torch.randn(2, 6, 3, 4), torch.randn(8, 6), torch.randn(2, 6, 5)
    pixels, steps = torch.rand(2, 3, 4) < 0.8, torch.arange(5) < torch.tensor([[5], [3]])
    spectrum = torch.randn(8, 6, dtype=torch.complex64)
    return {
        "norm": ((image,), {}),
        "norm_rms": ((rows,), {}),
        "norm_masked": ((sequence.mT, steps), {}),
        "norm_static": ((image,), {}),
        "norm_static_partition": ((rows,), {}),
        "norm_label": ((rows,), {"graph": Partition(NODES)}),
        "norm_label_counted": ((rows,), {"graph": NODES}),
        "norm_conditional": ((sequence,), {"weight": torch.randn(2, 6), "bias": torch.randn(2, 6)}),
        "norm_running": ((image,), {}),
        "norm_running_average": ((image,), {}),
        "norm_running_label": ((rows,), {"graph": NODES}),
        "norm_running_static": ((rows,), {}),
        "norm_cumulative": ((sequence,), {}),
        "norm_complex": ((spectrum,), {}),
        "norm_unit_offset": ((rows,), {}),
        "sync_batch": ((image,), {}),
        "channel_group": ((image, pixels), {}),
        "channel_group_unequal": ((image,), {}),
        "channel_group_rewritten": ((image,), {}),
        "soft_group": ((image,), {}),
        "token_group": ((sequence.mT, steps), {}),
        "sequence_group": ((sequence,), {"lengths": [5, 3]}),
        "sequence_group_packed": ((rows,), {"cu_seqlens": torch.tensor([0, 3, 8])}),
        "mel_band": ((sequence, torch.tensor([5, 3])), {}),
        "mel_band_channel": ((torch.randn(2, 2, 6, 5),), {}),
        "cepstral": ((sequence,), {}),
        "cepstral_cumulative": ((sequence,), {"mask": steps}),
        "weighted_group": ((image, pixels), {}),
        "temporal_group": ((torch.randn(2, 6, 3, 2, 2),), {}),
        "spectral_group": ((torch.randn(2, 6, 16),), {}),
        "subgraph": ((rows, NODES // 2), {"batch": NODES}),
        "region": ((image, pixels), {}),
        "sensor": ((rows,), {}),
        "demographic": ((rows, torch.tensor([0, 1, -1, 0, 1, 0, 2, 1])), {}),
        "mixture": ((rows,), {}),
        "mixture_running": ((image,), {}),
        "switchable": ((image,), {}),
        "dual": ((image,), {}),
        "context": ((image, pixels), {}),
        "transition": ((image,), {}),
        "channel_affine": ((image,), {}),
        "norm_act": ((image,), {}),
    }


def model_of_graphs() -> nn.ModuleDict:
    """One of each layer that needs torch-geometric, as it is built."""
    from flexnorm import graphs

    return nn.ModuleDict(
        {
            "batch": graphs.BatchNorm(6),
            "feature_group": graphs.FeatureGroupNorm(6),
            "feature_group_static": graphs.FeatureGroupNorm(6, groups=NODES),
            "graph_group": graphs.GraphGroupNorm(2, 6),
            "graph": graphs.GraphNorm(6),
            "graph_size": graphs.GraphSizeNorm(),
            "hetero_batch": graphs.HeteroBatchNorm(6, 4),
            "hetero_layer": graphs.HeteroLayerNorm(6, 4),
            "instance": graphs.InstanceNorm(6, affine=True, track_running_stats=True),
            "layer": graphs.LayerNorm(6),
            "layer_node": graphs.LayerNorm(6, mode="node"),
            "mean_subtraction": graphs.MeanSubtractionNorm(),
            "node_group": graphs.NodeGroupNorm(2, 6),
            "pair": graphs.PairNorm(scale=2.0),
        }
    )


def calls_of_graphs() -> dict[str, Call]:
    """What each of these layers is called with: x first."""
    x = torch.randn(8, 6)
    return {
        "batch": ((x,), {}),
        "feature_group": ((x,), {"groups": Partition(NODES)}),
        "feature_group_static": ((x,), {}),
        "graph_group": ((x, NODES, 5), {}),
        "graph": ((x, NODES), {}),
        "graph_size": ((x, NODES), {}),
        "hetero_batch": ((x, NODES), {}),
        "hetero_layer": ((x, NODES), {}),
        "instance": ((x, NODES), {}),
        "layer": ((x, Partition(NODES)), {}),
        "layer_node": ((x,), {}),
        "mean_subtraction": ((x, NODES), {}),
        "node_group": ((x,), {}),
        "pair": ((x, NODES), {}),
    }


# --- how a model came to be what was pickled -------------------------------------------------------------------------


def lived(made: nn.ModuleDict, inputs: dict[str, Call]) -> nn.ModuleDict:
    """The model after some training: parameters, running statistics and groups are not those that it began with."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if "channel_group_rewritten" in made:
            made["channel_group_rewritten"].group_ids.copy_(KIND)
            made["transition"].step.fill_(3)
            x = inputs["cepstral"][0][0]
            made["cepstral"].fit([x, 2 * x + 1])
        for _ in range(3):
            for name, (args, options) in inputs.items():
                made[name](1.5 * torch.randn_like(args[0]) + 0.5, *args[1:], **options)
    return made


def results(layer: nn.Module, call: Call) -> dict[str, Any]:
    """The result in evaluation; in training the result, if it differs, the gradient of x, and what runs on."""
    (x, *args), options = call
    evaluated = layer.eval()(x, *args, **options)
    x = x.clone().requires_grad_()
    y = layer.train()(x, *args, **options)
    direction = torch.arange(y.numel()).view(y.shape).sin()  # any: a sum of results alone would have no gradient
    (dx,) = torch.autograd.grad((y * direction).real.sum(), x)
    running = {key: t.clone() for key, t in layer.state_dict().items() if key.split(".")[-1] in STATISTICS}
    found = {"evaluated": evaluated.detach(), "dx": dx, "running": running}
    return found if torch.equal(evaluated, y) else {**found, "trained": y.detach()}


def values() -> dict[str, Any]:
    """Values that are pickled by themselves, among those of the calls."""
    x = torch.randn(4, 6)
    found: Moments = moments(x, "n c -> c")
    return {"x": x, "moments": found, "partition": Partition(NODES, 5), "counts": Partition(NODES, 5).counts}


def save(kind: str, value: Any, suffix: str) -> None:
    torch.save(value, path(kind, suffix))


def path(kind: str, suffix: str) -> pathlib.Path:
    """Where a file lies: its kind is "model", "state" or "calls", its suffix "" or "_graphs"."""
    return HERE / f"{kind}{suffix}_{COMMIT}.pt"


MODELS: dict[str, tuple[Callable[[], nn.ModuleDict], Callable[[], dict[str, Call]]]] = {
    "": (model, calls),
    "_graphs": (model_of_graphs, calls_of_graphs),
}


def main() -> None:
    torch.set_num_threads(1)
    for suffix, (build, inputs) in MODELS.items():
        torch.manual_seed(0)
        told = inputs()
        made = lived(build(), told)
        save("model", made, suffix)
        save("state", dict(made.state_dict()), suffix)
        found: dict[str, Any] = {
            name: {"args": args, "options": options, **results(made[name], (args, options))}
            for name, (args, options) in told.items()
        }
        save("calls", {"layers": found, **({"values": values()} if not suffix else {})}, suffix)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises unless they are equal to 1e-5 of the largest value.

    Another processor, another version of torch and another kernel add in another order. Each such difference is some
    roundings of float32, of 6e-8 of the largest value each: 1e-5 is 150 of them, and far below any change of meaning.
    """
    most = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * most, msg=lambda text: f"{what}: {text}")


if __name__ == "__main__":
    main()
