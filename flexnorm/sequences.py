"""Sequences of different lengths: GroupNorm per token and over the valid time, in every container they come in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .calls.call import NONE, Call, named
from .calls.functional import formula_for
from .errors import ShapeError, SpecError, as_int, say, shown
from .layers.norm import Norm
from .partition import Partition, readable
from .spec import Spec

__all__ = ["SequenceGroupNorm", "TokenGroupNorm", "as_mask", "frame_lengths"]

Lengths = Tensor | Sequence[int]


# --- what is valid ---------------------------------------------------------------------------------------------------


def as_mask(
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
    key_padding_mask: Tensor | None = None,
    *,
    batch: int | Sequence[int],
    time: int,
    device: torch.device | str | None = None,
) -> Tensor | None:
    """What of a padded batch is valid, from whichever form says so: a bool tensor (batch, time), True = valid.

    Args:
        mask: True or 1 = valid: bool, or the integers 0 and 1 as in Hugging Face's `attention_mask`; (batch, time), or
            with further axes of size 1 behind the batch, as (batch, 1, time).
        lengths: valid steps at the beginning of every sequence: integers (batch), a tensor on any device or a list.
        key_padding_mask: bool, True = padding, as in `nn.MultiheadAttention`: (batch, time).
        batch, time: sizes of the padded tensor; batch may be several axes.
        device: of a mask made from lengths. The others stay where they are.

    Returns:
        The mask, or None if nothing is given: then everything is valid.

    Raises:
        SpecError: more than one is given; a mask is floating, or holds other integers than 0 and 1.
        ShapeError: a shape does not fit; a length is negative or beyond time. Values of tensors on a GPU are checked by
            a device-side assertion.

    >>> as_mask(lengths=[1, 3], batch=2, time=3)
    tensor([[ True, False, False],
            [ True,  True,  True]])
    >>> as_mask(torch.tensor([[0, 1, 1]]), batch=1, time=3)
    tensor([[False,  True,  True]])
    >>> as_mask(key_padding_mask=torch.tensor([[True, False, False]]), batch=1, time=3)
    tensor([[False,  True,  True]])
    """
    shape = tuple(batch) if isinstance(batch, Sequence) else (batch,)  # a tracer's size is no int
    told = {"mask": mask, "lengths": lengths, "key_padding_mask": key_padding_mask}
    told = {name: value for name, value in told.items() if value is not None}
    if len(told) > 1:
        raise SpecError(
            say(
                f"{' and '.join(told)} are given, and each of them says what is valid",
                received=", ".join(f"{name}={shown(value)}" for name, value in told.items()),
                instead="one of them",
            )
        )
    if lengths is not None:
        limits = _checked_lengths(lengths, shape, time)
        steps = torch.arange(time, device=device if device is not None else limits.device)
        return steps < limits.to(steps.device).unsqueeze(-1)
    if mask is not None:
        return _fitted(_valid(mask), "mask", (*shape, time))
    if key_padding_mask is not None:
        return _fitted(_not_padding(key_padding_mask), "key_padding_mask", (*shape, time))
    return None


def _valid(mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        received, instead = f"mask={shown(mask)}", "mask=torch.as_tensor(mask), or lengths=[...]"
        raise SpecError(say("mask is a tensor", received=received, instead=instead))
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise SpecError(
            say(
                "mask says what is valid: True or 1; a floating one could be additive, or weights",
                received=f"mask={shown(mask)}{_range(mask)}",
                instead="mask=(mask == 0) for an additive one, 0 where valid and -inf where not; mask=mask.bool() for "
                "one of 1.0 and 0.0; Norm(pattern) for weights",
            )
        )
    _assure(
        ((mask == 0) | (mask == 1)).all(),
        "the integers of a mask are 0 and 1, 1 = valid",
        lambda: SpecError(
            say(
                "the integers of a mask are 0 and 1, 1 = valid",
                received=f"mask={shown(mask)}{_range(mask)}",
                instead="lengths=..., if these are lengths; mask=(ids != padding_id), if these are tokens",
            )
        ),
    )
    return mask.bool()


def _not_padding(key_padding_mask: Tensor) -> Tensor:
    if isinstance(key_padding_mask, Tensor) and key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    instead = "mask=key_padding_mask, if 1 stands for valid; key_padding_mask.bool(), if it stands for padding"
    if isinstance(key_padding_mask, Tensor) and key_padding_mask.is_floating_point():
        instead = "mask=(key_padding_mask == 0) for an additive one, 0 where valid and -inf where not"
    raise SpecError(
        say(
            "key_padding_mask is a bool tensor, True = padding, as in nn.MultiheadAttention",
            received=f"key_padding_mask={shown(key_padding_mask)}",
            instead=instead,
        )
    )


def _fitted(valid: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """The mask as (*batch, time): axes of size 1 beside the time are left out."""
    if tuple(valid.shape) == shape:
        return valid
    axes = len(shape) - 1
    beside = [size for size in valid.shape[axes:] if size != 1]
    if (
        valid.dim() > len(shape)
        and tuple(valid.shape[:axes]) == shape[:-1]
        and beside == [s for s in shape[-1:] if s != 1]
    ):
        return valid.reshape(shape)
    instead = f"a mask of shape {shape}"
    if tuple(valid.shape) == shape[::-1]:
        instead = f"{name}.T"
    elif beside[-2:] == [shape[-1]] * 2:
        instead += ", which says of every step whether it is valid; this one is of pairs of steps"
    raise ShapeError(
        say(
            f"{name} has the axes (batch, time) of x: shape {shape}",
            received=f"{name} of shape {tuple(valid.shape)}",
            instead=instead,
        )
    )


def _checked_lengths(lengths: Lengths, shape: tuple[int, ...], time: int) -> Tensor:
    """One length for every sequence, from 0 to time."""
    steps = _steps(lengths, lambda: f"(lengths * {time}).round().long(), if these are parts of the time of x")
    if tuple(steps.shape) != shape:
        raise ShapeError(
            say(
                f"lengths has one value for every sequence: shape {shape}",
                received=f"lengths of shape {tuple(steps.shape)}",
                instead="lengths.flatten()"
                if steps.numel() == math.prod(shape)
                else "a length for every sequence of x",
            )
        )
    _assure(
        ((steps >= 0) & (steps <= time)).all(),
        "lengths are from 0 to the time of x",
        lambda: ShapeError(
            say(
                f"lengths are from 0 to the time of x, {time}",
                received=f"lengths={shown(steps.tolist())}",
                instead=f"frame_lengths(lengths, conv), if x went through convolutions; lengths.clamp(0, {time}), if "
                "it was cut",
            )
        ),
    )
    return steps


def _steps(lengths: Lengths, of_floating: Callable[[], str]) -> Tensor:
    """lengths as a tensor of integers."""
    if isinstance(lengths, (list, tuple)) and all(as_int(value) is not None for value in lengths):
        return torch.tensor(lengths, dtype=torch.int64, device="cpu")  # whatever the default device is
    if isinstance(lengths, Tensor) and _is_integral(lengths):
        return lengths if lengths.dtype.itemsize >= 4 else lengths.long()  # narrow integers would overflow
    floating = isinstance(lengths, Tensor) and lengths.is_floating_point()
    raise SpecError(
        say(
            "lengths are whole numbers of steps: a tensor of integers, or a list",
            received=f"lengths={shown(lengths)}",
            instead=of_floating() if floating else "lengths=torch.tensor([12, 9])",
        )
    )


def _is_integral(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def _range(t: Tensor) -> str:
    if not (readable(t) and t.numel() and t.device.type == "cpu") or t.is_complex():
        return ""
    return f", from {t.min().item():g} to {t.max().item():g}"


def _assure(good: Tensor, rule: str, error: Callable[[], ValueError]) -> None:
    """Raises at once where the value can be read without waiting; elsewhere a device-side assertion does, whose rule
    holds no numbers, as they would be compiled in."""
    if torch.compiler.is_compiling() or (readable(good) and good.device.type != "cpu"):
        torch._assert_async(good, f"flexnorm: {rule}")
    elif readable(good) and not good:
        raise error()


# --- containers without padding --------------------------------------------------------------------------------------


def _segments(cu_seqlens: Tensor | Partition, total: int, device: torch.device) -> Partition:
    """Which sequence every row of a packed tensor belongs to. It waits for no device."""
    if isinstance(cu_seqlens, Partition):
        if tuple(cu_seqlens.shape) != (total,):
            received = f"cu_seqlens={cu_seqlens!r}, x of {total} rows"
            rule, instead = "a Partition of packed sequences has an id for every row of x", "Partition.from_offsets(cu)"
            raise ShapeError(say(rule, received=received, instead=instead))
        return cu_seqlens
    integral = isinstance(cu_seqlens, Tensor) and _is_integral(cu_seqlens)
    if not (integral and cu_seqlens.dim() == 1 and cu_seqlens.numel()):
        raise SpecError(
            say(
                "cu_seqlens is a tensor of whole numbers: where every sequence begins, and the end of the last",
                received=f"cu_seqlens={shown(cu_seqlens)}",
                instead="nn.functional.pad(lengths.cumsum(0), (1, 0))",
            )
        )
    ends = cu_seqlens.to(device)
    _assure(
        (ends[0] == 0) & (ends[-1] == total) & (ends.diff() >= 0).all(),
        "cu_seqlens begin with 0, never fall, and end with the rows of x",
        lambda: ShapeError(
            say(
                f"cu_seqlens begin with 0, never fall, and end with the rows of x, {total}",
                received=f"cu_seqlens={shown(cu_seqlens.tolist())}",
                instead="nn.functional.pad(lengths.cumsum(0), (1, 0))",
            )
        ),
    )
    return Partition._between(ends, total)


def _jagged_rows(x: Any) -> tuple[Partition, Tensor | None]:
    """Which sequence every row of `x.values()` belongs to, and which rows do: `torch.nested.narrow` leaves holes."""
    starts, lengths = x.offsets(), x.lengths()
    total = x.values().shape[x._ragged_idx - 1]
    segments = Partition._between(starts, total)
    if lengths is None:
        return segments, None
    place = torch.arange(total, device=starts.device) - starts[segments.ids]
    return segments, (place >= 0) & (place < lengths[segments.ids])


# --- the layers ------------------------------------------------------------------------------------------------------


class _OfSequences(Norm, nn.GroupNorm):
    """What both layers share: the containers, and what an `nn.GroupNorm` is from outside."""

    _rows: Spec  # the pattern of rows one behind the other; what is between the sequences of a jagged tensor is masked

    def __init__(
        self,
        pattern: str,
        num_groups: int,
        num_channels: int,
        eps: float,
        affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool,
    ) -> None:
        Norm.__init__(
            self,
            pattern,
            affine="(g c)" if affine else None,
            g=num_groups,
            sizes={"(g c)": num_channels},
            bias=bias,
            eps=eps,
            device=device,
            dtype=dtype,
        )
        self.num_groups, self.num_channels, self.affine = num_groups, num_channels, affine

    extra_repr = nn.GroupNorm.extra_repr

    def forward(  # type: ignore[override]  # what Norm takes beside the mask, nn.GroupNorm has not
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | Partition | None = None,
    ) -> Tensor:
        """Normalizes x, in the container that it comes in.

        Args:
            x: padded, packed, or a jagged NestedTensor, with the axes that the class describes.
            mask: bool or integers, True or 1 = valid: (batch, time) or (batch, 1, time); of packed rows, (rows).
            lengths: valid steps at the beginning of every sequence: (batch), in steps of x.
            key_padding_mask: bool, True = padding, as in `nn.MultiheadAttention`: (batch, time).
            cu_seqlens: x is packed; where every sequence begins, and the end of the last: (batch + 1). Or a `Partition`
                of the rows, which serves many layers.
        """
        if lengths is None and key_padding_mask is None and cu_seqlens is None:
            return super().forward(x, mask)
        told = named(lengths=lengths, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens)
        return super().forward(x, mask, labels=told)

    def fit_given(self, call: Call, around: Mapping[str, Any]) -> Call:
        """What is valid, if the call does not say it. `cu_seqlens` is for packed rows alone."""
        if call.mask is not None or call.names:
            return call
        if isinstance(call.x, Tensor) and "cu_seqlens" in around and self._asks_for_cu_seqlens(call.x):
            return call._replace(names={"cu_seqlens": around["cu_seqlens"]})
        if isinstance(call.x, Tensor) and call.x.is_nested:
            return call
        return super().fit_given(call, {name: value for name, value in around.items() if name != "cu_seqlens"})

    def fit_call(self, call: Call) -> Call:
        """Padded rows with a mask, packed rows with their sequences as labels."""
        x, mask, names = call.x, call.mask, call.names
        self._check(x, names if mask is None else {"mask": mask, **names})
        if not names and mask is None and not x.is_nested:
            if x.numel() == self.num_groups:
                size = list(x.shape)
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
            return call
        if x.is_nested:
            return self._of_rows(call, *self._jagged(x))
        cu_seqlens, lengths, padding = names.get("cu_seqlens"), names.get("lengths"), names.get("key_padding_mask")
        if cu_seqlens is not None:
            segments = _segments(cu_seqlens, x.shape[0], x.device)
            return self._of_rows(call, x, segments, as_mask(mask, None, padding, batch=(), time=x.shape[0]))
        return call.fit(x, as_mask(mask, lengths, padding, **self._place(x)), NONE)

    def unfit(self, call: Call, y: Tensor) -> Tensor:
        """The jagged tensor of the rows."""
        x: Any = call.x
        if not x.is_nested:
            return y
        y = y.transpose(0, x._ragged_idx - 1)
        return torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx)

    def _place(self, x: Tensor) -> dict[str, Any]:
        """Where x has batch and time."""
        raise NotImplementedError

    def _asks_for_cu_seqlens(self, x: Tensor) -> bool:
        """Whether x means nothing without."""
        raise NotImplementedError

    def _fault(self, x: Tensor, told: Mapping[str, Any]) -> tuple[str, str] | None:
        """The rule that x breaks, and what to type instead."""
        raise NotImplementedError

    def _check(self, x: Tensor, told: Mapping[str, Any]) -> None:
        fault: tuple[str, str] | None
        if not isinstance(x, Tensor):
            raise SpecError(say("x is a torch.Tensor", received=type(x).__name__, instead="torch.as_tensor(x)"))
        if x.is_nested and x.layout != torch.jagged:  # which has no shape to show
            received, instead = f"x of {x.layout}", "torch.nested.as_nested_tensor(x.unbind(), layout=torch.jagged)"
            raise SpecError(say("a NestedTensor has the layout torch.jagged", received=received, instead=instead))
        if x.is_nested and told:
            fault = ("a jagged tensor says itself what is valid", "norm(x)")
        elif "cu_seqlens" in told and "lengths" in told:
            fault = ("cu_seqlens and lengths are given, and each of them says where sequences end", "one of them")
        elif "cu_seqlens" in told and (x.dim() != 2 or x.shape[1] != self.num_channels):
            fault = (f"packed x is (rows, {self.num_channels})", "mask= or lengths=, if x is padded")
        else:
            fault = None if "cu_seqlens" in told else self._fault(x, told)
        if fault is not None:
            received = ", ".join([f"x of shape {tuple(x.shape)}", *(f"{n}={shown(v)}" for n, v in told.items())])
            raise ShapeError(say(fault[0], received=received, instead=fault[1]))

    def _of_rows(self, call: Call, x: Tensor, segments: Partition, mask: Tensor | None) -> Call:
        """The call of packed rows."""
        affine = call.formula.affines[0] if call.formula.affines else None
        told = (("(g c)", self.num_channels), ("g", self.num_groups))
        formula = formula_for(self._rows, call.formula.options, affine, told)
        names = {"seq": segments} if formula.lookups else NONE
        return call._replace(formula=formula, x=x, mask=mask, names=names)

    def _jagged(self, x: Any) -> tuple[Tensor, Partition, Tensor | None]:
        return (x.values().transpose(0, x._ragged_idx - 1), *_jagged_rows(x))


class TokenGroupNorm(_OfSequences):
    r"""GroupNorm of every token alone: its groups of channels are the sets.

    For each token t and group g:   y[t, g] = (x[t, g] - mean(x[t, g])) / sqrt(var(x[t, g]) + eps) * weight + bias

    Args:
        num_groups: number of groups, a divisor of num_channels. One group is LayerNorm.
        num_channels: size of the last axis of x.
        eps: added to the variance, in the unit of x squared.
        affine: learn a weight and a bias for every channel: (num_channels).
        device, dtype: of the parameters.
        bias: learn a bias beside the weight.

    Shapes: x is (..., num_channels), padded or packed, or a jagged NestedTensor (batch, time, num_channels); the result
    is of the same kind. `mask` has the axes of x but the last, and `lengths` is about the last but one. Padding gets 0.

    Raises:
        SpecError, ShapeError: num_groups does not divide num_channels; x, a mask, lengths do not fit. See `as_mask`.
        ValueError: x is one value for every group, as in torch.

    >>> norm = TokenGroupNorm(2, 8)
    >>> norm(torch.randn(3, 5, 8), lengths=[5, 2, 4]).shape
    torch.Size([3, 5, 8])

    Difference to `nn.GroupNorm`: channels are the last axis, and nothing else is pooled. `cu_seqlens` is checked and
    changes no result: a token knows no sequence.

    Source: Wu and He, "Group Normalization", 2018.
    """

    _rows = Spec.parse("t ... (g c), t -> t ... g")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__("... (g c), ... -> ... g", num_groups, num_channels, eps, affine, device, dtype, bias)

    def _place(self, x: Tensor) -> dict[str, Any]:
        return {"batch": x.shape[:-2], "time": x.shape[-2], "device": x.device}

    def _asks_for_cu_seqlens(self, x: Tensor) -> bool:
        return False

    def _fault(self, x: Tensor, told: Mapping[str, Any]) -> tuple[str, str] | None:
        rule = f"x is (..., {self.num_channels})"
        if x.is_nested and x._ragged_idx == x.dim() - 1:  # type: ignore[attr-defined]
            return f"{rule}; of this one, the last axis is ragged", "x.transpose(1, 2)"
        if x.dim() == 0 or x.shape[-1] != self.num_channels:
            turned = x.dim() > 1 and x.shape[1] == self.num_channels
            return rule, "x.transpose(1, -1)" if turned else f"a last axis of size {self.num_channels}"
        if told and x.dim() == 1:
            return "one token has no other to be told from", "norm(x)"
        return None


class SequenceGroupNorm(_OfSequences):
    r"""GroupNorm over the valid time of every sequence; padding never counts.

    For each sequence b and group g:   y[b, g] = (x[b, g] - mean(x[b, g])) / sqrt(var(x[b, g]) + eps) * weight + bias

    Args:
        num_groups: number of groups, a divisor of num_channels.
        num_channels: number of channels of x.
        eps: added to the variance, in the unit of x squared.
        affine: learn a weight and a bias for every channel: (num_channels).
        device, dtype: of the parameters.
        bias: learn a bias beside the weight.
        channels_last: padded x is (batch, time, num_channels), not (batch, num_channels, time).

    Shapes: padded x is (batch, num_channels, time), as for `nn.GroupNorm`, or with channels_last (batch, time,
    num_channels). Packed x is (rows, num_channels) in either case, and a jagged NestedTensor says itself which axis is
    time: (batch, time, num_channels) or (batch, num_channels, time). The result is of the same kind. Padding gets 0.

    Raises:
        SpecError, ShapeError: num_groups does not divide num_channels; x, a mask, lengths do not fit. See `as_mask`.
        ValueError: x is one value for every group, as in torch.

    >>> norm = SequenceGroupNorm(2, 8)
    >>> x = torch.randn(2, 8, 5)
    >>> y = norm(x, lengths=[5, 3])
    >>> torch.allclose(y[1:, :, :3], norm(x[1:, :, :3]), atol=1e-6)  # as if it were alone
    True
    >>> norm(torch.randn(8, 8), cu_seqlens=torch.tensor([0, 5, 8])).shape
    torch.Size([8, 8])

    Difference to `nn.GroupNorm`: x has exactly one axis of time. Without mask and lengths the results are the same.

    Source: Wu and He, "Group Normalization", 2018; the layer of wav2vec 2.0's first convolution and of the Conformer.
    """

    _rows = Spec.parse("t (g c), t -> seq[t] g")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        channels_last: bool = False,
    ) -> None:
        pattern = "b t (g c), b t -> b g" if channels_last else "b (g c) t, b t -> b g"
        super().__init__(pattern, num_groups, num_channels, eps, affine, device, dtype, bias)
        self.channels_last = channels_last

    def extra_repr(self) -> str:
        """As in `nn.GroupNorm`, and where the channels are."""
        return super().extra_repr() + ", channels_last=True" * self.channels_last

    def _place(self, x: Tensor) -> dict[str, Any]:
        return {"batch": x.shape[0], "time": x.shape[1 if self.channels_last else 2], "device": x.device}

    def _asks_for_cu_seqlens(self, x: Tensor) -> bool:
        return x.dim() == 2

    def _fault(self, x: Tensor, told: Mapping[str, Any]) -> tuple[str, str] | None:
        channels = self.num_channels
        last = x._ragged_idx == 1 if x.is_nested else self.channels_last  # type: ignore[attr-defined]
        if x.dim() == 3 and x.shape[2 if last else 1] == channels:
            return None
        instead = f"a tensor of three axes with {channels} channels"
        if x.dim() == 2 and x.shape[1] == channels:
            instead = "norm(x, cu_seqlens=...), if these are packed sequences"
        elif x.dim() == 2:
            instead = "x.unsqueeze(0), if this is one sequence"
        elif x.dim() == 3 and not x.is_nested and x.shape[1 if last else 2] == channels:
            instead = f"x.transpose(1, 2), or channels_last={not last} when the layer is built"
        return f"x is (batch, time, {channels})" if last else f"x is (batch, {channels}, time)", instead


# --- from samples to frames ------------------------------------------------------------------------------------------

Layer = nn.Module | Iterable[Any]  # or a tuple: kernel, stride, padding, dilation

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLINGS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_KEEPING = (  # layers behind which there are as many steps as before; none of them looks at its axes' sizes
    nn.Identity,
    *(getattr(nn, name) for name in nn.modules.dropout.__all__),
    *(getattr(nn, name) for name in nn.modules.activation.__all__ if name not in ("GLU", "MultiheadAttention")),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, Norm, nn.modules.batchnorm._NormBase),
)


def frame_lengths(lengths: Lengths, *layers: Layer, axis: int = -1) -> Tensor:
    r"""How many steps are left of sequences behind convolutions and pooling: what each has there when it is alone.

    Behind a window:   floor((length + 2 * padding - dilation * (kernel - 1) - 1) / stride) + 1,   at least 0

    Args:
        lengths: steps (samples) of every sequence: integers, of any shape; 0 stays 0.
        *layers: one behind the other. Modules (Conv, ConvTranspose, MaxPool, AvgPool of 1 to 3 axes, `nn.Sequential`;
            activations, dropout and norms change nothing), tuples (kernel, stride=1, padding=0, dilation=1), and
            iterables of such.
        axis: which of the axes of a window is time, for those of 2 or 3.

    Raises:
        SpecError: a layer is of a kind that is not known to change lengths like this; lengths are no integers.

    >>> frame_lengths(torch.tensor([16000, 400, 399]), (400, 160))
    tensor([98,  1,  0])
    >>> frame_lengths([10, 7], nn.Sequential(nn.Conv1d(1, 4, 3, stride=2), nn.ReLU(), nn.MaxPool1d(2)))
    tensor([2, 1])
    """
    steps = _steps(lengths, lambda: "lengths.round().long()")
    for layer in layers:
        if _is_window(layer):
            kernel, stride, padding, dilation = (*layer, *(1, 0, 1)[len(layer) - 1 :])
            steps = _behind(steps, kernel, stride, padding, dilation)
        elif isinstance(layer, Iterable) and not isinstance(layer, str):  # nn.Sequential and nn.ModuleList are
            steps = frame_lengths(steps, *layer, axis=axis)
        else:
            steps = _behind_module(steps, layer, axis)
    return steps


def _is_window(layer: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(layer, tuple) and 1 <= len(layer) <= 4 and all(as_int(value) is not None for value in layer)


def _behind_module(steps: Tensor, layer: object, axis: int) -> Tensor:
    if isinstance(layer, _KEEPING):
        return steps

    def of(option: str, default: Any = None) -> Any:
        value = getattr(layer, option, default)
        return value[axis] if isinstance(value, tuple) else value

    if isinstance(layer, _TRANSPOSED):
        more = of("dilation") * (of("kernel_size") - 1) + of("output_padding") + 1 - 2 * of("padding")
        return torch.where(steps > 0, (steps - 1) * of("stride") + more, 0).clamp(min=0)
    if isinstance(layer, _CONVOLUTIONS) and layer.padding == "same":
        return steps  # of stride 1, always
    if isinstance(layer, (*_CONVOLUTIONS, *_POOLINGS)):
        padding = 0 if layer.padding == "valid" else of("padding")
        window = (of("kernel_size"), of("stride"), padding, of("dilation", 1))
        return _behind(steps, *window, ceil=getattr(layer, "ceil_mode", False))
    raise SpecError(
        say(
            "frame_lengths knows convolutions, pooling, and layers that keep every step",
            received=shown(layer),
            instead="(kernel, stride, padding, dilation) of what it does, or its convolutions: "
            "[m for m in model.modules() if isinstance(m, nn.Conv1d)]",
        )
    )


def _behind(steps: Tensor, kernel: int, stride: int, padding: int, dilation: int, ceil: bool = False) -> Tensor:
    room = steps + 2 * padding - dilation * (kernel - 1) - 1
    behind = room.div(stride, rounding_mode="floor") + 1
    if ceil:  # one window more, if it begins before the padding on the right does
        behind = behind + ((room % stride > 0) & (behind * stride < steps + padding))
    return torch.where(steps > 0, behind, 0).clamp(min=0)
