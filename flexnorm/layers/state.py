"""The state of a layer: parameters, static labels and running statistics, in this order, under torch's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .running import RunningStatistics
from .static_labels import StaticLabels


class _Stateful(nn.Module):
    """Writes and loads what a layer keeps. A key of the state is an attribute, and a pickle of any version loads."""

    running_statistics = RunningStatistics()
    """How layers of this class keep running statistics."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    _static: StaticLabels

    _version = 2  # as torch's batch norms count: `num_batches_tracked` came with the second

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        """One counter, of a layer with a momentum, is that of every set. State of early versions of torch has none."""
        key, own = f"{prefix}num_batches_tracked", self.num_batches_tracked
        given = state_dict.get(key)
        if own is not None and own.dim() and isinstance(given, Tensor) and given.dim() == 0:
            state_dict[key] = given.expand(own.shape).clone()
        if given is None and own is not None and local_metadata.get("version", 1) < 2:
            state_dict[key] = torch.ones(own.shape, dtype=own.dtype)  # it has seen something, and may evaluate
        # nn.Module's, as a batch norm beside this class would add a counter of its own
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, *others)
        self._static.load(state_dict, prefix, *others)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._static.move(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Static labels stand between parameters and buffers."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._static.write(destination, prefix)
        for key in [prefix + name for name in self._buffers]:
            if key in destination:
                destination[key] = destination.pop(key)

    # What a key of the state names is an attribute, for those who look for it there: `torch.func.functional_call`,
    # `torch.distributed.checkpoint`, `from_pretrained`.

    def __getattr__(self, name: str) -> Any:
        static = self.__dict__.get("_static")
        if static is not None and name in static.names:
            return static[static.names[name]].ids
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        static = self.__dict__.get("_static")
        if static is not None and name in static.names:
            static.adopt(static.names[name], value)
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pickles of earlier versions have the ids among the buffers, and flags in place of objects."""
        if state.get("_evaluates_unseen"):
            state = {**state, "running_statistics": replace(type(self).running_statistics, unseen=True)}
        if isinstance(state.get("_static"), dict):
            state = {**state, "_buffers": dict(state["_buffers"])}
            state["_static"] = static = StaticLabels(state["_lookups"], state["_static"], torch.device("cpu"))
            for key, name in static.names.items():
                static.adopt(name, state["_buffers"].pop(key))
            del state["_built"]
        super().__setstate__(state)  # type: ignore[no-untyped-call]
