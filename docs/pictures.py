"""Draws the pictures of docs/gallery.md, into docs/pictures, every pattern as it stands there; and the README's."""

import sys
from pathlib import Path
from typing import Any

import torch

from flexnorm import Partition
from flexnorm.drawing import draw

FOLDER = Path(__file__).resolve().parent / "pictures"

images: dict[str, Any] = {"shape": (4, 8, 6, 6)}
nodes: dict[str, Any] = {"shape": (12, 8)}
graph = Partition.from_sizes([3, 5, 4])
region = torch.zeros(4, 6, 6, dtype=torch.long)
region[:, 2:5, 1:4] = 1
mixed = torch.tensor([0, 1, 1, 0, 2, 2, 0, 1, 2, 0, 1, 1])
steps, frames = torch.arange(6), torch.arange(9)
tokens = {"shape": (3, 6, 8), "mask": steps < torch.tensor([6, 4, 2])[:, None]}
speech = {"shape": (3, 8, 9), "mask": frames < torch.tensor([7, 9, 5])[:, None]}

PICTURES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "three": (
        ("n c h w -> c", "n c h w -> n c", "n c h w -> n"),
        {**images, "titles": ["BatchNorm", "InstanceNorm", "LayerNorm"]},
    ),
    "group-norm": (("n (g c) ... -> n g",), {**images, "g": 4}),
    "instance-norm": (("n c ... -> n c",), images),
    "layer-norm-image": (("n c ... -> n",), images),
    "layer-norm": (("... c -> ...",), {"shape": (3, 6, 8)}),
    "batch-norm": (("n c ... -> c",), images),
    "ghost-batch-norm": (("(k n) c ... -> k c",), {**images, "k": 2}),
    "positional-norm": (("n c h w -> n h w",), images),
    "sensors": (("n c t -> n sensor[c]",), {"shape": (2, 9, 6), "sensor": Partition.from_sizes([2, 3, 4])}),
    "regions": (("n c h w -> n c region[n h w]",), {**images, "region": region}),
    "patches": (("n c (y h) (x w) -> n y x",), {**images, "h": 3, "w": 3}),
    "video": (("b (g c) t h w -> b t g", "b (g c) t h w -> b g"), {"shape": (2, 8, 4, 6, 6), "g": 2}),
    "weighted-voxels": (
        ("n c d h w, d -> n c",),
        {"shape": (1, 3, 5, 4, 4), "mask": torch.tensor([1.0, 1.0, 2.0, 4.0, 4.0])},
    ),
    "tokens": (("b t (g c), b t -> b t g",), {**tokens, "g": 2}),
    "utterances": (("b (g c) t, b t -> b g",), {**speech, "g": 2}),
    "masked-batch-norm": (("b c t, b t -> c",), speech),
    "packed": (("t (g c) -> doc[t] g",), {**nodes, "doc": graph, "g": 2}),
    "series": (("b t c -> b c",), {"shape": (4, 24, 3)}),
    "node-features": (("v (g c) -> v g",), {**nodes, "g": 2}),
    "graph-instance-norm": (("v c -> graph[v] c",), {**nodes, "graph": graph}),
    "graph-layer-norm": (("v c -> graph[v]",), {**nodes, "graph": graph}),
    "graph-group-norm": (("v (g c) -> graph[v] g",), {**nodes, "graph": graph, "g": 2}),
    "parts": (("v c -> part[v] c",), {**nodes, "part": mixed}),
    "types": (
        ("v c -> type[v] c",),
        {**nodes, "type": torch.tensor([0, 2, 1, 0, 2, 2, 0, 1, 2, 0, 1, 1])},
    ),
    "mel-bands": (("n c f t -> n c band[f]",), {"shape": (2, 3, 10, 8), "band": Partition.from_sizes([2, 3, 5])}),
    "sub-spectral": (("n c (s f) t -> c s",), {"shape": (2, 3, 10, 8), "s": 2}),
    "cmvn": (("b f t -> b f",), {"shape": (2, 5, 8)}),
    "domains": (("n c -> group[n] c",), {"shape": (12, 5), "group": mixed}),
}


def main(folder: Path) -> None:
    """Writes all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (patterns, what) in PICTURES.items():
        draw(*patterns, path=folder / f"{name}.svg", **what)


FRONT: dict[str, Any] = {**images, "g": 2, "titles": ["BatchNorm", "LayerNorm", "GroupNorm"]}

if __name__ == "__main__":
    if len(sys.argv) == 1:  # the README's picture is in the repository, where no site is built
        front = ("n c h w -> c", "n c h w -> n", "n (g c) h w -> n g")
        draw(*front, path=FOLDER.parent / "sets.svg", **FRONT)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
