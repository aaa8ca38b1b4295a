"""Static labels: what a layer was told once about groups. They are part of its state, and they are not buffers.

Others write to buffers: an average of models truncates ids, and `to_empty` fills ids with whatever the memory holds.
The ids here change only where a state is loaded or other ids are assigned, and both are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..calls.arguments import Label, as_partition
from ..calls.call import Call
from ..calls.ranks import is_dtensor
from ..errors import ShapeError, SpecError, say, shown
from ..partition import Partition, readable
from ..spec import Expr, Lookup, Spec


class StaticLabels(Mapping[str, Partition]):
    """The static labels of a layer, by name.

    Their ids are never on the meta device, unless they were given there: a layer that leaves it has them.

    Args:
        lookups: where each label is read, by name.
        partitions: what the layer is built with.
        device: of the layer.
    """

    def __init__(
        self, lookups: Mapping[str, tuple[Expr, Lookup]], partitions: Mapping[str, Partition], device: torch.device
    ) -> None:
        self.lookups = {name: lookups[name] for name in partitions}
        self.names = {f"{name}_ids": name for name in partitions}  # by the keys of the state
        self.built = {name: _kept(partition, torch.device("cpu")) for name, partition in partitions.items()}
        # What a call uses. It is replaced as a whole, and never written to.
        self.held = {name: _kept(partition, device) for name, partition in partitions.items()}

    def __getitem__(self, name: str) -> Partition:
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)

    # --- devices

    def beside(self, x: Tensor) -> dict[str, Partition]:
        """The labels on the device of x, where they stay. A trace has partitions of its own, so that nothing of a trace
        is kept."""
        held = self.held
        if not isinstance(x, Tensor):  # the pattern refuses x
            return dict(held)
        away = [name for name, partition in held.items() if partition.device != x.device]
        for name in away:
            if held[name].ids.is_meta:
                raise self._without_ids(name, x)
        if not readable(x):
            found = {}
            for name, p in held.items():
                here = (p.ids.to(x.device), p.count) if name in away else (p.ids, p.count, p._tables)
                found[name] = Partition._made(*here)
            return found
        if away:
            self.held = held = {name: _kept(partition, x.device) for name, partition in held.items()}
        return dict(held)

    def _without_ids(self, name: str, x: Tensor) -> SpecError:
        expr, lookup = self.lookups[name]
        return SpecError(
            expr.error(
                f"the ids of label {name!r} were given on the meta device, which holds no values",
                lookup,
                received=f"x on {x.device}",
                instead=f'{name}=torch.tensor([0, 1], device="cpu") when the layer is built, or load_state_dict(...)',
            )
        )

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves the ids to where fn moves tensors, as `_apply` of a module does. fn may also change dtypes or make new
        memory, and ids have neither."""
        for name, partition in self.held.items():
            like = torch.empty(0, dtype=torch.int64, device=partition.device)
            self.held = {**self.held, name: _kept(partition, fn(like).device)}

    def reset(self) -> None:
        """What the layer was built with, on the device where the labels are now."""
        self.held = {name: _kept(self.built[name], partition.device) for name, partition in self.held.items()}

    # --- state

    def write(self, state: dict[str, Any], prefix: str) -> None:
        """Writes copies of the ids, because many tools change the tensors of a state in place."""
        for key, name in self.names.items():
            state[prefix + key] = self.held[name].ids.clone()

    def load(
        self,
        state: Mapping[str, Any],
        prefix: str,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Takes the ids of a state. Those that do not fit change nothing, and say so in `errors`."""
        for key, name in self.names.items():
            if prefix + key in unexpected:
                unexpected.remove(prefix + key)
            if prefix + key in state:
                try:
                    self.adopt(name, state[prefix + key])
                except (SpecError, ShapeError) as error:
                    errors.append(f"{prefix}{key}: {error}")
            elif strict:
                missing.append(prefix + key)

    def adopt(self, name: str, ids: Any) -> None:
        """Takes other ids of one label. Ids on the meta device, which holds no values, change nothing."""
        held, (expr, lookup) = self.held[name], self.lookups[name]
        ids = ids.full_tensor() if is_dtensor(ids) else ids
        if isinstance(ids, Tensor) and ids.shape != held.shape:
            raise ShapeError(
                expr.error(
                    f"the ids of label {name!r} have the shape that the layer was built with: {tuple(held.shape)}",
                    lookup,
                    received=f"ids of shape {tuple(ids.shape)}",
                    instead=f"a layer that is built with {name}=ids",
                )
            )
        if isinstance(ids, Tensor) and ids.is_meta:
            return
        if isinstance(ids, Tensor) and not readable(ids):  # torch.func or a tracer, for one call: nothing to look at
            new = Partition._made(ids, held.count)
        else:
            on_cpu = ids.detach().cpu() if isinstance(ids, Tensor) else ids  # where a wrong id is an error at once
            new = as_partition(expr, lookup, on_cpu, held.count)
            if held.device.type == "cpu" and torch.equal(held.ids, new.ids):
                return
            if held.ids.is_meta:
                self.built = {**self.built, name: new}
            new = _kept(new, held.device)
        self.held = {**self.held, name: new}


def _kept(partition: Partition, device: torch.device) -> Partition:
    """The same groups on a device, if there are values to move, and it holds values. No inference tensor."""
    ids = partition.ids
    away = ids.device != device and not ids.is_meta and device.type != "meta"
    if not away and not ids.is_inference():
        return partition._settle()
    with torch.inference_mode(False):  # ids are saved for backward
        return Partition._made(ids.to(device) if away else ids.clone(), partition.count)._settle()


def given_once(spec: Spec, names: Mapping[str, Label], labels: Mapping[str, Label]) -> Mapping[str, Label]:
    """The labels of a call, as keywords and in `labels=`."""
    if not names:
        return labels
    for name in names:
        if name in labels:
            received, instead = f"{name}={shown(names[name])}, and again in labels=", "leave one out"
            raise SpecError(say(f"{name!r} is given once", text=spec.text, received=received, instead=instead))
    return {**names, **labels}


def read_labels(
    call: Call,
    spec: Spec,
    lookups: Mapping[str, tuple[Expr, Lookup]],
    static: StaticLabels,
    counts: Mapping[str, int],
) -> Mapping[str, Partition] | None:
    """The labels of a fitted call, static ones included. None: the names of the call are all of them.

    Args:
        spec: the pattern of the layer.
        lookups: where the layer reads each label.
        counts: the numbers of values that were told when the layer was built.
    """
    read = call.formula.lookups
    for name, value in call.names.items():
        if type(value) is not Partition or name not in read or name in counts:
            break
    else:
        if not static.held:
            return None  # a layer of a field has read them
    found = static.beside(call.x) if static.held else {}
    for name, value in call.names.items():
        if name in static or not (name in lookups or name in read):
            raise _refused(spec, lookups, static, name, value)
        found[name] = as_partition(*(lookups.get(name) or read[name]), value, counts.get(name))
    return found


def _refused(
    spec: Spec, lookups: Mapping[str, tuple[Expr, Lookup]], static: StaticLabels, name: str, value: object
) -> SpecError:
    known = name in static
    return SpecError(
        say(
            f"{name!r} is a static label of this layer" if known else f"{name!r} is no label of this layer",
            text=spec.text,
            received=f"{name}={shown(value)}",
            instead=f"Norm(..., {name}={shown(value)}): sizes of axes are told when the layer is built"
            if any(axis.name == name for axis in spec.x.axes())
            else f"build the layer without {name}= to give it at every call"
            if known
            else f"one of: {', '.join(n for n in lookups if n not in static) or 'none'}",
        )
    )
