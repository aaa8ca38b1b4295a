"""Axes of x that are spread over ranks, `sharded="n"`, and the ranks that their sets go on over."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .. import collectives
from ..errors import SpecError, say, shown
from ..kernels import Recipe, Sums, stat_dtype
from ..spec import Axis, Dots, Spec
from ..statistics import Moments


class Ranks:
    """The ranks that a call is made on together; as a `Whole`, the sets of all of them.

    Within `with ranks:`, whatever raises here before `agree` raises on all ranks; and who opens the block agrees in it.
    What follows on the moments is each rank's own, and the losses of all are added; `replicated`, it is one loss, which
    all compute alike, as of DTensors.
    """

    def __init__(self, groups: Iterable[Any], *, replicated: bool = False, agreeing: Iterable[Any] = ()) -> None:
        self.replicated = replicated
        self.groups = [group for group in groups if group.size() > 1]
        self.agreeing = list(agreeing)  # these agree on the call, and sets do not go on over them
        self._agreed = not (self.groups or self.agreeing)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not self._agreed:
            self._agreed = True
            collectives.agree([*self.groups, *self.agreeing], "", differentiated=False, needed=False, error=error)
        assert self._agreed, "a rank that never agrees leaves the others waiting, if one of them fails"

    def agree(self, recipe: Recipe, dtype: torch.dtype, *, differentiated: bool, needed: bool) -> bool:
        """Whether any rank needs the gradient of x; see `collectives.agree`."""
        sets = recipe.sets
        weights = recipe.mask is not None and not recipe.membership
        what = f"{sets.count} sets of ({sets.expr}), shape {sets.shape}{', weighted' * weights}, in {stat_dtype(dtype)}"
        return self.agree_on(what, differentiated=differentiated, needed=needed)

    def agree_on(self, what: str, *, differentiated: bool, needed: bool) -> bool:
        """`agree`, in words that are the same on all ranks."""
        if self._agreed:
            return needed
        self._agreed = True
        return collectives.agree([*self.groups, *self.agreeing], what, differentiated=differentiated, needed=needed)

    def moments(self, part: Moments) -> Moments:
        for group in self.groups:
            part = part.gathered(group, replicated=self.replicated)
        return part

    def sums(self, part: Sums) -> Sums:
        both = torch.stack([part.grad, part.grad_xhat])
        for group in self.groups:
            both = collectives.add(both, group)
        return Sums(both[0], both[1], part.weight, part.bias)


_inquiries = 0  # while a model is explained, its layers ask no other rank


@contextmanager
def alone() -> Iterator[None]:
    """Within, every layer computes with its own part of the data."""
    global _inquiries
    _inquiries += 1
    try:
        yield
    finally:
        _inquiries -= 1


class Sharding:
    """Which axes of x are spread over the ranks of a process group: where they are pooled, sets go on over the ranks.

    Args:
        sharded: names of axes: `"n"`, `"h w"`, or a sequence of names.
        process_group: of `torch.distributed`; None is the default one at every call.
        cumulative: the axis that statistics are cumulated along.
        as_torch: as `nn.SyncBatchNorm`, ask other ranks in training only, and none where there is no process group.

    Raises:
        SpecError: no axis has this name, some of the axes are pooled and others are not, or one of them is cumulated.
    """

    def __init__(
        self,
        spec: Spec,
        sharded: str | Sequence[str],
        process_group: Any = None,
        cumulative: str | None = None,
        *,
        as_torch: bool = False,
    ) -> None:
        words = sharded.split() if isinstance(sharded, str) else sharded
        good = isinstance(words, (list, tuple)) and words and all(isinstance(word, str) for word in words)
        if not good or len(set(words)) < len(words):
            received, instead = f"sharded={shown(sharded)}", f'sharded="{next(spec.x.axes(), "n")}"'
            rule = "sharded names axes of x, each once"
            raise SpecError(say(rule, text=spec.text, received=received, instead=instead))
        atoms = {str(atom): atom for atom in spec.x.atoms() if isinstance(atom, (Axis, Dots))}
        for word in words:
            if word not in atoms:
                raise SpecError(
                    spec.x.error(
                        f"sharded names axes of x, and {word!r} is none",
                        *spec.x.elements,
                        received=f"sharded={shown(sharded)}",
                        instead=f"one of: {', '.join(atoms) or 'none, as there is no axis with a name'}",
                    )
                )
        if cumulative in words:
            raise SpecError(
                spec.x.error(
                    "what is cumulated along an axis has all of it on one rank",
                    atoms[str(cumulative)],
                    received=f"cumulative={cumulative!r}, sharded={shown(sharded)}",
                    instead="another axis in sharded=, or none",
                )
            )
        kept = [word for word in words if is_kept(spec, atoms[word])]
        if kept and len(kept) < len(words):
            pooled = [word for word in words if word not in kept]
            raise SpecError(
                spec.sets.error(
                    "sets go on over the ranks that the pooled axes are sharded over, and these sets are apart along "
                    f"{', '.join(kept)}",
                    *(atoms[word] for word in kept),
                    received=f"sharded={shown(sharded)}",
                    instead=f'sharded="{" ".join(pooled)}", with process_group= the ranks that share {", ".join(kept)}',
                )
            )
        self.names = tuple(words)
        self.merged = not kept
        self.process_group = process_group
        self.as_torch = as_torch
        self._left_out = False

    def ranks(self, training: bool = True) -> Ranks:
        """Those of this call; none if no set goes on elsewhere."""
        if _inquiries:
            return Ranks([])
        if self._left_out:
            raise RuntimeError(
                say(
                    "a process group belongs to its process, so copies and pickles of a layer leave it out",
                    received="a copy of a layer that had a group of its own",
                    instead="norm.process_group = group, or None for all ranks",
                )
            )
        nobody = self.process_group is None and not (dist.is_available() and dist.is_initialized())
        if not self.merged or (self.as_torch and (nobody or not training)):
            return Ranks([])
        return Ranks([collectives.group_of(self.process_group)])  # not kept: groups end before their process

    def of(self, spec: Spec, *group: Any) -> Sharding:
        """The same axes, of other sets; with the same group, if none is told."""
        other = Sharding(spec, self.names, *(group or (self.process_group,)), as_torch=self.as_torch)
        other._left_out = self._left_out and not group
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None, "_left_out": self.process_group is not None}


def regrouped(sharding: Sharding | None, layer: Any, group: Any) -> Sharding:
    """The sharding of a layer, with another process group."""
    if sharding is None:
        rule, received = "a process group is one of sharded axes", f"{layer}, without sharded="
        raise SpecError(say(rule, received=received, instead='Norm(..., sharded="n", process_group=group)'))
    return sharding.of(layer.spec, group)


def is_kept(spec: Spec, axis: Axis | Dots) -> bool:
    """Whether sets are apart along this axis by itself, so that none goes on along it."""
    return axis in list(spec.sets.atoms())


def is_dtensor(x: object) -> bool:
    """Whether it is a `torch.distributed.tensor.DTensor`, which only exists if somebody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)
