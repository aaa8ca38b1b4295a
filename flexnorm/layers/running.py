"""Running statistics: how a layer moves its means and variances while training, and evaluates by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..calls.call import Call, Result
from ..calls.computing import moments_of
from ..calls.ranks import is_dtensor
from ..calls.routes import bound, run
from ..errors import SpecError, say, shown
from ..library import library
from ..partition import readable
from ..statistics import Moments, each
from ..watching import unwatched

Known = tuple[Tensor, Tensor]  # values, and where they are known


@dataclass(frozen=True)
class RunningStatistics:
    """How layers of a class keep running statistics. It holds no tensor: it reads and writes the buffers of a layer.

    The buffers have torch's names: `running_mean`, `running_var` (unbiased) and `num_batches_tracked`.

    Args:
        unseen: the layer evaluates by mean 0 and variance 1 before it has seen a batch, as torch's norms do.
        per_set: where momentum is None and labels name sets, every set counts its own batches.
    """

    unseen: bool = False
    per_set: bool = True

    # --- the buffers

    def build(self, layer: Any, shape: Sequence[int] | None, labelled: bool, device: Any, dtype: Any) -> None:
        """Gives a layer its buffers; None for the shape: it keeps nothing."""
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            layer.register_buffer(name, None)
        if shape is not None:
            layer.running_mean = torch.empty(shape, device=device, dtype=dtype)
            real = dtype.to_real() if dtype is not None and dtype.is_complex else dtype
            layer.running_var = torch.empty(shape, device=device, dtype=real)
            counts = shape if self.per_set and labelled and layer.momentum is None else ()
            layer.num_batches_tracked = torch.empty(counts, device=device, dtype=torch.int64)

    def reset(self, layer: Any) -> None:
        """Mean 0, variance 1, no batch seen."""
        for buffer, value in ((layer.running_mean, 0), (layer.running_var, 1), (layer.num_batches_tracked, 0)):
            if buffer is not None:
                buffer.fill_(value)

    # --- what a class of layers may do in its own way

    def seen(self, layer: Any, m: Moments) -> tuple[Moments, ...]:
        """The moments that move the running statistics, from the moments of a batch."""
        return (m,)

    def values(self, layer: Any, *seen: Moments) -> tuple[Known, Known]:
        """The mean and the variance that the running ones move to."""
        (m,) = seen
        return (m.mean, m.count > 0), m.unbiased_var()

    def moments(self, layer: Any) -> Moments:
        """The moments that a layer evaluates by."""
        mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
        self._check_seen(layer, mean, var)
        return Moments(torch.ones_like(var), mean, var)

    # --- a call

    def run(self, layer: Any, call: Call) -> Result:
        """The result of a call in training, after which the running statistics have moved."""
        if call.ranks is None and unwatched(call.x) and not call.formula.options.correction:
            kept: list[Any] = []
            y = bound(call, kept)
            if y is not None:
                if not self.moved_in_place(layer, call.x, *kept):
                    self.track(layer, moments_of(call.x, kept))
                return Result(y)
        result = run(call, tracked=True)
        if result.moments is not None:
            self.track(layer, result.moments)
        return result

    def track(self, layer: Any, m: Moments) -> None:
        """Moves the running statistics to a batch of these moments."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing computes the same batch again
        seen = self.seen(layer, m)
        if any(m.mean.requires_grad for m in seen):
            seen = tuple(each(Tensor.detach, m) for m in seen)
        collected = layer.__dict__.get("_collected")
        if collected is not None:
            wide = [m.rounded(torch.float64) for m in seen]
            pairs = zip(collected, wide, strict=True)
            layer.__dict__["_collected"] = tuple(a.merge(b) for a, b in pairs) if collected else tuple(wide)
            return
        _set(layer, self.updated(layer, *seen))

    def updated_by(self, layer: Any, seen: Moments) -> dict[str, Tensor]:
        """The buffers after a batch of these moments, which a user hands in."""
        old = layer.running_mean
        if not isinstance(seen, Moments) or (old is not None and seen.mean.shape != old.shape):
            received = f"moments of shape {tuple(seen.mean.shape)}" if isinstance(seen, Moments) else shown(seen)
            rule, instead = "running statistics move to Moments of the same sets", "norm(x, return_moments=True)[1]"
            raise SpecError(say(rule, text=layer.spec.text, received=received, instead=instead))
        return self.updated(layer, seen)

    def updated(self, layer: Any, *seen: Moments) -> dict[str, Tensor]:
        """The buffers after a batch. Empty sets stay, and so do variances of one element."""
        mean, var, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if mean is None or var is None or batches is None:
            rule, instead = "a layer that keeps running statistics is built so", "Norm(..., track_running_stats=True)"
            raise SpecError(say(rule, received=f"{layer}", instead=instead))
        values = self.values(layer, *seen)
        if layer.momentum is None:  # one counter for both: a set without a variance counts for neither
            values = (values[0][0], values[1][1]), values[1]
        counted = values[0][1]
        batches = whole(batches)
        batches = batches + (counted if batches.dim() else counted.any())  # a batch of nothing is none
        moved = []
        for old, (value, known) in zip(map(whole, (mean, var)), values, strict=True):
            weight = layer.momentum if layer.momentum is not None else batches.clamp(min=1).to(old.dtype).reciprocal()
            moved.append(torch.lerp(old, value.to(old.dtype), weight).where(known, old))
        return {"running_mean": moved[0], "running_var": moved[1], "num_batches_tracked": batches}

    def moved_in_place(self, layer: Any, x: Tensor, packed: Tensor, count: Tensor | None) -> bool:
        """Whether the library has moved the running statistics: plain buffers by a fixed momentum, in one pass."""
        own = layer._buffers
        if layer.momentum is None or type(self) is not RunningStatistics:
            return False
        if layer.__dict__.get("_collected") is not None or torch._C._current_graph_task_id() != -1:
            return False
        buffers = own["running_mean"], own["running_var"], own["num_batches_tracked"]
        if buffers[0] is None or (buffers[0].is_inference() and not torch.is_inference_mode_enabled()):
            return False
        if library().track(*buffers, layer.momentum, packed, count, x.numel()) is None:
            return False
        increment_version(buffers)
        return True

    # --- checks

    def check_kind(self, layer: Any, x: Tensor, mean: Tensor) -> None:
        """Raises where x is complex and the running means are not, or the reverse."""
        if isinstance(x, Tensor) and x.is_complex() != mean.is_complex():
            received, instead = f"x of {x.dtype}, running_mean of {mean.dtype}", f"Norm(..., dtype={x.dtype})"
            rule = "running means are complex where x is, and only there"
            raise SpecError(say(rule, text=layer.spec.text, received=received, instead=instead))

    def _check_seen(self, layer: Any, mean: Tensor, var: Tensor) -> None:
        """Raises where running statistics are what they were at first. No device is waited for."""
        batches = layer.num_batches_tracked
        if self.unseen or batches is None or batches.device.type != "cpu" or not readable(batches):
            return
        if not batches.any() and not mean.any() and bool((var == 1).all()):
            raise SpecError(
                say(
                    "a layer evaluates by its running statistics, and these have seen no batch",
                    text=layer.spec.text,
                    received=f"{layer}, in evaluation",
                    instead="norm.train() and some batches, calibrate(model, batches), load_state_dict(...), or "
                    "norm.num_batches_tracked.fill_(1), if mean 0 and variance 1 are meant",
                )
            )


def _set(layer: Any, buffers: Mapping[str, Tensor]) -> None:
    try:
        for name, value in buffers.items():
            overwrite(layer.get_buffer(name), value)
    except RuntimeError as error:
        if not torch._C._are_functorch_transforms_active():
            raise
        raise RuntimeError(
            say(
                "torch.func changes nothing in place, so running statistics cannot be updated within",
                received=f"{layer}, in training",
                instead="y, seen = norm(x, return_moments=True), then norm.updated(seen); or norm.eval()",
            )
        ) from error


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> nn.Module:
    """Sets the running statistics of all norms in a model to those of all batches together: merged, not averaged.

    Norms normalize by each batch as in training, everything else is in evaluation; modes are as before at the end. If
    something raises on the way, no statistic has changed.

    Args:
        model: with `Norm` layers that have `track_running_stats=True`.
        batches: what `model(batch)` takes; of a list or a tuple, the first. An epoch of a `DataLoader`, say.
        forward: how the model is called, `forward(model, batch)`, if not so.

    Returns:
        The model.

    Raises:
        SpecError: no norm in the model has running statistics, or none of them saw an element.

    >>> from flexnorm import Norm, calibrate
    >>> model = nn.Sequential(nn.Linear(4, 3), Norm("n c -> c", c=3, track_running_stats=True))
    >>> x = torch.randn(100, 4)
    >>> model = calibrate(model, x.split(30))
    >>> torch.allclose(model[1].running_var, model[0](x).var(0), rtol=1e-4)
    True
    """
    norms: list[Any] = [
        m for m in model.modules() if isinstance(getattr(m, "running_statistics", None), RunningStatistics)
    ]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        received, instead = shown(type(model).__name__), "torch.optim.swa_utils.update_bn, for layers of torch.nn"
        raise SpecError(say("norms with running statistics are calibrated", received=received, instead=instead))
    if isinstance(batches, Tensor):
        rule, instead = "batches are several: an iterable of what the model takes", "calibrate(model, [x])"
        raise SpecError(say(rule, received=shown(batches), instead=instead))
    modes = [(module, module.training) for module in model.modules()]
    seen = 0
    try:
        model.eval()
        for norm in norms:
            norm.training, norm.__dict__["_collected"] = True, ()
        for batch in batches:
            if forward is not None:
                forward(model, batch)
            else:
                model(batch[0] if isinstance(batch, (list, tuple)) else batch)
            seen += 1
        pairs = [(norm, norm.__dict__["_collected"]) for norm in norms]
        collected = [(norm, norm.running_statistics.values(norm, *found)) for norm, found in pairs if found]
    finally:
        for module, mode in modes:
            module.training = mode
        for norm in norms:
            norm.__dict__.pop("_collected", None)
    collected = [(norm, values) for norm, values in collected if values[0][1].any()]
    if not collected:
        received = f"{seen} batches, in which no norm saw an element"
        raise SpecError(say("statistics are those of batches", received=received, instead="batches that hold some"))
    for norm, values in collected:
        tracked = norm.num_batches_tracked
        for buffer, (value, known) in zip((norm.running_mean, norm.running_var), values, strict=True):
            assert buffer is not None
            buffer.copy_(value.to(buffer.dtype).where(known, buffer))
        assert tracked is not None
        tracked.copy_(values[1][1] * seen if tracked.dim() else torch.tensor(seen))
    return model


def checked_momentum(momentum: float | None) -> float | None:
    """The momentum, if it is one."""
    number = isinstance(momentum, (int, float)) and not isinstance(momentum, bool)
    if momentum is not None and not (number and 0 <= momentum <= 1):
        raise SpecError(
            say(
                "momentum is the weight of the new value, from 0 to 1; None averages all batches alike",
                received=f"momentum={shown(momentum)}",
                instead="momentum=0.1",
            )
        )
    return momentum


def whole(t: Any) -> Tensor:
    """A buffer as every rank has it."""
    full: Tensor = t.full_tensor() if is_dtensor(t) else t
    return full


def overwrite(buffer: Any, value: Tensor) -> None:
    """Writes a value that every rank has into a buffer."""
    if is_dtensor(buffer):
        from ..calls.dtensors import distribute_tensor

        value = distribute_tensor(value, buffer.device_mesh, buffer.placements)
    buffer.copy_(value)
