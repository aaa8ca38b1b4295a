"""DTensors: their placements say which axes are sharded. Imported when one comes, as torch's DTensor is not light."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor import distribute_tensor as distribute_tensor

from ..errors import SpecError, say
from ..partition import Partition
from ..spec import Axis, Dots, Element, Group
from ..statistics import Moments, each
from .arguments import Formula, Param
from .call import Call
from .ranks import Ranks, is_kept


@dataclass(frozen=True)
class _Cut:
    """What a dimension of the mesh cuts: an axis (of those of an ellipsis, the one at `offset`) of this whole size."""

    axis: Axis | Dots
    offset: int
    size: int


class Placed:
    """A DTensor under a pattern: what of everything lies on this rank, and the ranks that a set goes on over.

    Operands that are no DTensors are whole on every rank, and so are their gradients.

    Raises:
        SpecError: x is sharded along a composition, so that it is unknown along which of its axes.
    """

    def __init__(self, formula: Formula, x: DTensor) -> None:
        x = x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])
        self.x, self.mesh, self.spec = x, x.device_mesh, formula.spec
        self.cuts = [self._cut(p.dim) if isinstance(p, Shard) else None for p in x.placements]
        pooled = [i for i, cut in enumerate(self.cuts) if cut is not None and not is_kept(self.spec, cut.axis)]
        self.ranks = Ranks([self.mesh.get_group(i) for i in pooled])
        cut_names = {str(cut.axis) for cut in self.cuts if cut is not None}
        sizes = {name: size for name, size in formula.sizes if name not in cut_names}
        self.formula = Formula(self.spec, formula.options, formula.affines, sizes)

    def _cut(self, dim: int) -> _Cut:
        elements, size = self.spec.x.elements, self.x.shape[dim]
        place = 0
        for element in elements:
            width = self._width(element)
            if place <= dim < place + width:
                if isinstance(element, (Axis, Dots)):
                    return _Cut(element, dim - place, size)
                raise SpecError(
                    self.spec.x.error(
                        "a DTensor is sharded along axes that have a name, and not along compositions",
                        element,
                        received=f"placements {tuple(self.x.placements)}",
                        instead=f"x.redistribute(placements=...) with Replicate() in place of Shard({dim})",
                    )
                )
            place += width
        return _Cut(Dots(), dim, size)  # the pattern has fewer axes than x, and will say so

    def _width(self, element: Element) -> int:
        """The dimensions that an element stands for."""
        return self.x.dim() - len(self.spec.x.elements) + 1 if isinstance(element, Dots) else 1

    def _place(self, elements: Sequence[Element], cut: _Cut | None) -> int | None:
        """The dimension of an operand over these elements that is cut."""
        place = 0
        for element in elements if cut is not None else ():
            assert cut is not None
            if element == cut.axis:
                return place + cut.offset
            if isinstance(element, Group) and cut.axis in element.atoms:
                raise SpecError(
                    say(
                        f"{cut.axis} is sharded, and an operand holds it in the composition {element}",
                        text=self.spec.text,
                        received=f"placements {tuple(self.x.placements)}",
                        instead=f"the axes of {element} apart, or x.redistribute(placements=...)",
                    )
                )
            place += self._width(element)
        return None

    def local(self, t: Tensor | None, elements: Sequence[Element]) -> Any:
        """What of an operand over these elements goes with the elements of x here."""
        if not isinstance(t, Tensor):
            return t
        if not isinstance(t, DTensor):
            t = DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        places = [self._place(elements, cut) for cut in self.cuts]
        placements = [Replicate() if place is None else Shard(place) for place in places]
        gradients = [
            Partial() if cut is not None and place is None else placement
            for cut, place, placement in zip(self.cuts, places, placements, strict=True)
        ]
        return t.redistribute(self.mesh, placements).to_local(grad_placements=gradients)

    def here(self, call: Call) -> Call:
        """The part of a call that lies on this rank."""
        mask_axes = () if self.spec.mask is None else self.spec.mask.elements
        return Call(
            self.formula,
            self.x.to_local(),
            self.local(call.mask, mask_axes),
            tuple(self.params(call.stages)),
            self.moments(call.moments),
            self.labels(call.names),
        )

    def labels(self, labels: Mapping[str, Partition]) -> dict[str, Partition]:
        return {
            name: Partition._made(self.local(label.ids, self.formula.lookups[name][1].axes), label.count)
            for name, label in labels.items()
        }

    def params(self, params: Sequence[Param]) -> list[Param]:
        return [
            (self.local(weight, expr.elements), self.local(bias, expr.elements))
            for expr, (weight, bias) in zip(self.formula.affines, params, strict=True)
        ]

    def moments(self, m: Moments | None) -> Moments | None:
        """Of moments of all sets, those of the sets here."""
        return None if m is None else each(lambda t: self.local(t, self.spec.sets.elements), m)

    def all_moments(self, m: Moments) -> Moments:
        """The reverse, on every rank."""
        places = [self._place(self.spec.sets.elements, cut) for cut in self.cuts]
        shape = list(m.mean.shape)
        for place, cut in zip(places, self.cuts, strict=True):
            if place is not None and cut is not None:
                shape[place] = cut.size
        return each(lambda t: self._joined(t, places, torch.Size(shape)).full_tensor(), m)

    def result(self, y: Tensor) -> DTensor:
        places = [p.dim if isinstance(p, Shard) else None for p in self.x.placements]
        return self._joined(y, places, self.x.shape, self.x.stride())

    def _joined(
        self, t: Tensor, places: Sequence[int | None], shape: torch.Size, stride: tuple[int, ...] | None = None
    ) -> DTensor:
        placements = [Replicate() if place is None else Shard(place) for place in places]
        stride = torch.empty(shape, device="meta").stride() if stride is None else stride
        return DTensor.from_local(t, self.mesh, placements, run_check=False, shape=shape, stride=stride)
