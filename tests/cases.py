"""The table of good cases that many tests walk: every row of the pattern table, and what stands between them."""

from dataclasses import dataclass, field

import torch

from flexnorm import Partition


@dataclass(frozen=True)
class Case:
    name: str
    pattern: str
    shape: tuple
    sizes: dict = field(default_factory=dict)
    labels: dict = field(default_factory=dict)  # name -> (shape of the ids, count)
    mask: tuple | None = None  # ("bool" or "float", shape)
    affine: str | None = None
    parameter: tuple | None = None  # shape of weight and bias
    options: dict = field(default_factory=dict)


CASES = [
    Case("group", "n (g c) ... -> n g", (2, 6, 3, 2), {"g": 3}, affine="(g c)", parameter=(6,)),
    Case("group_1d", "n (g c) ... -> n g", (3, 6), {"c": 3}, affine="g c", parameter=(2, 3)),
    Case("instance", "n c ... -> n c", (2, 3, 2, 2, 2), affine="c", parameter=(3,)),
    Case("layer", "n c ... -> n", (3, 4, 5)),
    Case("layer_last", "... c -> ...", (2, 3, 8), affine="c", parameter=(8,)),
    Case("batch", "n c ... -> c", (4, 3, 5), affine="c", parameter=(3,)),
    Case("rms", "... c -> ...", (3, 2, 8), affine="c", parameter=(8,), options={"center": False}),
    Case("center_only", "n c t -> n c", (2, 3, 5), options={"scale": False}),
    Case("all", "... -> ", (3, 4)),
    Case("singles", "n c -> n c", (3, 4), affine="c", parameter=(4,)),
    Case("zero_rank", "->", ()),
    Case("unit_axes", "n 1 c () -> c 1 n", (2, 1, 5, 1)),
    Case("anonymous", "(h 2) (w 2) c -> h w c", (4, 6, 3)),
    Case("composed_right", "n (g c) t -> (g n)", (2, 6, 4), {"g": 2}),
    Case("relu", "n (g c) -> n g", (3, 8), {"g": 2}, affine="(g c)", parameter=(8,), options={"activation": "relu"}),
    Case("silu", "n (g c) t -> n g", (2, 4, 3), {"g": 2}, affine="g", parameter=(2,), options={"activation": "silu"}),
    Case("gelu", "n c t -> n", (2, 3, 4), options={"activation": "gelu"}),
    Case(
        "token_group",
        "b t (g c), b t -> b t g",
        (2, 5, 6),
        {"g": 2},
        mask=("bool", (2, 5)),
        affine="(g c)",
        parameter=(6,),
    ),
    Case(
        "utterance",
        "b (g c) t, b t -> b g",
        (3, 4, 7),
        {"g": 2},
        mask=("bool", (3, 7)),
        affine="(g c)",
        parameter=(4,),
    ),
    Case("masked_batch", "b c t, b t -> c", (3, 4, 6), mask=("bool", (3, 6)), affine="c", parameter=(4,)),
    Case("masked_rms", "b t c, b t -> b", (2, 5, 3), mask=("bool", (2, 5)), options={"center": False}),
    Case(
        "masked_silu",
        "b t c, t b -> b",
        (2, 5, 3),
        mask=("bool", (5, 2)),
        affine="c",
        parameter=(3,),
        options={"activation": "silu"},
    ),
    Case("mask_flat", "b (h w) c, b h w -> b c", (2, 6, 3), {"h": 2}, mask=("bool", (2, 2, 3))),
    Case("mask_composed", "b h w c, b (h w) -> b c", (2, 2, 3, 3), mask=("bool", (2, 6))),
    Case("mask_full", "n ... c, n ... c -> c", (3, 2, 2, 4), mask=("bool", (3, 2, 2, 4))),
    Case("packed", "t (g c) -> doc[t] g", (9, 4), {"g": 2}, {"doc": ((9,), 4)}, affine="(g c)", parameter=(4,)),
    Case("features_per_node", "v (g c) -> v g", (6, 8), {"g": 2}),
    Case("nodes_per_feature", "v c -> part[v] c", (8, 3), labels={"part": ((8,), 3)}, affine="c", parameter=(3,)),
    Case("graph_group", "v (g c) -> graph[v] g", (10, 6), {"g": 3}, {"graph": ((10,), 4)}),
    Case("node_types", "v c -> type[v] c", (9, 3), labels={"type": ((9,), 4)}, affine="type[v] c", parameter=(4, 3)),
    Case("typed_layer", "v c -> v", (6, 4), labels={"type": ((6,), 3)}, affine="type[v] c", parameter=(3, 4)),
    Case("bands", "n c f t -> n c band[f]", (2, 2, 7, 3), labels={"band": ((7,), 3)}, affine="f", parameter=(7,)),
    Case(
        "masked_bands",
        "n f t, n t -> n band[f]",
        (2, 6, 5),
        labels={"band": ((6,), 3)},
        mask=("bool", (2, 5)),
        affine="band[f]",
        parameter=(3,),
    ),
    Case("sensors", "n c t -> n sensor[c]", (2, 7, 3), labels={"sensor": ((7,), 3)}, affine="c", parameter=(7,)),
    Case("demographic", "n c -> group[n] c", (9, 3), labels={"group": ((9,), 4)}),
    Case("regions", "n c h w -> n region[n h w]", (2, 3, 3, 2), labels={"region": ((2, 3, 2), 4)}),
    Case("regions_over_images", "n c h w -> region[n h w]", (2, 3, 3, 2), labels={"region": ((2, 3, 2), 3)}),
    Case("regions_turned", "n c h w -> region[w h n] c", (2, 3, 3, 2), labels={"region": ((2, 3, 2), 3)}),
    Case("regions_row", "n c h w -> h n region[n h w]", (2, 2, 3, 4), labels={"region": ((2, 3, 4), 2)}),
    Case("regions_dots", "n c ... -> n region[n ...]", (2, 3, 3, 2), labels={"region": ((2, 3, 2), 3)}),
    Case("two_labels", "t c -> doc[t] kind[c]", (7, 6), labels={"doc": ((7,), 3), "kind": ((6,), 2)}),
    Case("two_labels_one_axis", "t c -> c (doc[t] part[t])", (8, 2), labels={"doc": ((8,), 2), "part": ((8,), 2)}),
    Case("label_all", "v c -> all[v]", (5, 3), labels={"all": ((5,), 1)}),
    Case("video_frames", "b (g c) t h w -> b t g", (2, 4, 3, 2, 2), {"g": 2}),
    Case("video_clip", "b (g c) t h w -> b g", (2, 4, 3, 2, 2), {"g": 2}),
    Case("voxels", "n c d h w, d -> n c", (2, 3, 4, 2, 2), mask=("float", (4,))),
    Case("weights", "b c t, b t -> b", (2, 3, 4), mask=("float", (2, 4)), affine="c", parameter=(3,)),
    Case(
        "weighted_rms",
        "b c t, b c -> t",
        (3, 2, 4),
        mask=("float", (3, 2)),
        options={"center": False},
        affine="c",
        parameter=(2,),
    ),
    Case("weighted_center", "b c t, b t -> c", (3, 2, 4), mask=("float", (3, 4)), options={"scale": False}),
    Case("weighted_labels", "v c, v -> graph[v]", (8, 3), labels={"graph": ((8,), 3)}, mask=("float", (8,))),
    Case("masked_labels", "v c, v -> graph[v] c", (9, 2), labels={"graph": ((9,), 3)}, mask=("bool", (9,))),
]

by_name = {case.name: case for case in CASES}
each = {"argvalues": CASES, "ids": [case.name for case in CASES]}


def arguments(case, *, seed=0, dtype=torch.float64, scale=1.0, offset=0.0, requires_grad=False):
    """x and the keyword arguments of `normalize`, made for a case. Labels leave gaps and are out of order."""
    g = torch.Generator().manual_seed(seed)

    def randn(shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x = (randn(case.shape) * scale + offset).to(dtype).requires_grad_(requires_grad)
    kwargs = {"sizes": case.sizes, "labels": {}, "affine": case.affine, **case.options}
    for name, (shape, count) in case.labels.items():
        ids = torch.randint(0, count, shape, generator=g)
        kwargs["labels"][name] = Partition(ids, count + (count > 1))  # the last value never occurs
    parameter = case.parameter
    if parameter is not None and case.affine and "[" in case.affine:
        parameter = (parameter[0] + 1, *parameter[1:])
    if parameter is not None:
        kwargs["weight"] = (1 + 0.5 * randn(parameter)).to(dtype).requires_grad_(requires_grad)
        kwargs["bias"] = randn(parameter).to(dtype).requires_grad_(requires_grad)
    if case.mask is not None:
        kind, shape = case.mask
        keep = torch.rand(shape, generator=g) < 0.7
        if kind == "bool":
            if len(shape) > 1:
                keep[-1] = False  # a row that is masked altogether
            kwargs["mask"] = keep
        else:
            weights = torch.rand(shape, generator=g, dtype=torch.float64) + 0.1
            kwargs["mask"] = weights.to(dtype).requires_grad_(requires_grad)
    return x, kwargs


def leaves(x, kwargs):
    """The tensors that gradients are asked for."""
    tensors = (x, kwargs.get("mask"), kwargs.get("weight"), kwargs.get("bias"))
    return [t for t in tensors if t is not None and t.requires_grad]
