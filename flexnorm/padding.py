"""`padding_proof`: an existing model of padded batches, made to give each sequence what it gets alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .calls.call import Call
from .errors import ShapeError, SpecError, say, shown
from .layers.norm import Norm
from .layers.running import RunningStatistics
from .sequences import as_mask, frame_lengths

__all__ = ["padding_proof"]

_Model = TypeVar("_Model", bound=nn.Module)


class _Run(NamedTuple):
    """A model that runs."""

    model: nn.Module
    stages: dict[int, Tensor | None] | None  # valid lengths (batch) of every padded size that time has had, if given
    outer: _Run | None  # the one that called it


_RUN: ContextVar[_Run | None] = ContextVar("flexnorm.padding", default=None)


def padding_proof(
    model: _Model,
    *,
    time_dim: int = 1,
    time_dim_2d: int = 2,
    trusted: type[nn.Module] | Iterable[type[nn.Module]] = (),
) -> _Model:
    """Makes a model give every sequence of a padded batch what it gives the sequence alone.

    GroupNorm, InstanceNorm and BatchNorm layers are replaced, in place, by ones whose statistics leave the padding out
    (the same parameters and buffers, subclasses of what they replace). Convolutions and pooling see zeros behind the
    end of a sequence, as they do when it stands alone, and carry its length on. All else stays: the class, the
    signature, the outputs, the `state_dict`. `model(x, lengths)` or `model(x, attention_mask=mask)` says what is valid;
    called without, the model computes as before. What padding holds does not matter.

    Args:
        model: with a `forward` that takes `lengths` (of the input, as in torchaudio) or `attention_mask` (1 = valid, as
            in Hugging Face's models), padded on the right. It is changed, and returned.
        time_dim: axis of time in the first argument of `forward`: 1 for (batch, time) and (batch, time, features).
        time_dim_2d: axis of time in the input of 2d layers: 2 for (batch, channels, time, frequencies).
        trusted: further classes of layers that you know to leave time alone, or to mask what is padding themselves.

    Returns:
        The model. To call this again looks for layers that were added.

    Raises:
        SpecError: `forward` takes neither argument; or a layer may mix time in a way that is not known here: a class
            that is no known one, circular or reflecting padding, pooling whose divisor depends on the end. It is named,
            and the model is unchanged.
        ShapeError: while running: lengths beyond the input, a mask with holes, or a layer that sees a number of steps
            that no known layer gave, or that two gave of sequences of different lengths.

    Activation checkpointing computes layers again when the lengths are gone: that raises. Methods other than `forward`
    are not covered.

    >>> class Net(nn.Sequential):
    ...     def forward(self, x, lengths=None):
    ...         return super().forward(x)
    >>> net = padding_proof(Net(nn.Conv1d(1, 8, 3), nn.GroupNorm(2, 8)), time_dim=2, trusted=[Net])
    >>> x = torch.randn(2, 1, 10)
    >>> y = net(x, torch.tensor([10, 6]))
    >>> torch.allclose(y[1:, :, :4], net(x[1:, :, :6]), atol=1e-6)
    True
    """
    names = _arguments(model)
    vouched: tuple[type[nn.Module], ...] = (trusted,) if isinstance(trusted, type) else tuple(trusted)
    modules = list(_named_modules(model))
    for name, module in modules:
        _check(name, module, vouched)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in modules:
        kind = _kind(module)
        if kind is not None and kind in _MASKED:
            if module not in replaced:
                replaced[module] = _MASKED[kind].of(module, name, time_dim_2d)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replaced[module])
        elif not getattr(module, "_followed", False):
            module._followed = True  # type: ignore[assignment]
            if kind is not None and kind in (*_ONE_D, *_TWO_D):
                axis = 2 if kind in _ONE_D else time_dim_2d
                module.register_forward_pre_hook(partial(_silence, name, axis, _fill(module)), with_kwargs=True)
                module.register_forward_hook(partial(_carry, name, axis), with_kwargs=True)
            elif kind is nn.MultiheadAttention:
                module.register_forward_pre_hook(partial(_masked_attention, name), with_kwargs=True)
            elif kind in (nn.GLU, nn.Linear, nn.LayerNorm, nn.RMSNorm):
                module.register_forward_pre_hook(partial(_apart_from_time, name), with_kwargs=True)
    if not getattr(model, "_padding_proof", False):
        model.register_forward_pre_hook(partial(_enter, names, time_dim), with_kwargs=True)
        model.register_forward_hook(_leave, always_call=True)
        model._padding_proof = True  # type: ignore[assignment]
    return model


# --- what runs -------------------------------------------------------------------------------------------------------


def _enter(
    names: tuple[str, ...], time_dim: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the model runs: notes what is valid, and empties the padding of its input."""
    outer = _RUN.get()
    if outer is not None and outer.model is model:  # left behind by an interrupt
        outer = outer.outer
    bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    told = {name: bound.arguments[name] for name in names if bound.arguments.get(name) is not None}
    if len(told) > 1:
        rule, received = "lengths or attention_mask says what is valid, not both", ", ".join(told)
        raise SpecError(say(rule, received=received, instead="one of them"))
    if not told:
        _RUN.set(_Run(model, None if outer is None else outer.stages, outer))
        return args, kwargs
    (name, given), *_ = told.items()
    inputs = [key for key, value in list(bound.arguments.items())[1:] if isinstance(value, Tensor) and key not in names]
    if not inputs:
        rule, instead = "a model is called with a tensor, and with what is valid of it", "model(x, lengths)"
        raise SpecError(say(rule, received=f"{name} alone", instead=instead))
    x = bound.arguments[inputs[0]]
    batch, time = x.shape[0], x.shape[time_dim]
    valid = as_mask(**{"mask" if name == "attention_mask" else name: given}, batch=batch, time=time, device=x.device)
    assert valid is not None
    lengths = valid.sum(1)
    if name == "attention_mask" and not torch.equal(valid, _prefix(lengths, time)):
        raise ShapeError(
            say(
                "attention_mask marks the beginning of every sequence: padding stands behind it",
                received=f"attention_mask={shown(given)} with zeros before ones",
                instead="sequences padded on the right: padding_side='right'",
            )
        )
    emptied = _emptied(x, lengths, time_dim, 0.0)
    _RUN.set(_Run(model, {time: lengths}, outer))
    if inputs[0] in kwargs:
        return args, {**kwargs, inputs[0]: emptied}
    return tuple(emptied if value is x else value for value in args), kwargs


def _leave(model: nn.Module, args: object, output: object) -> None:
    run = _RUN.get()
    if run is None or run.model is not model:  # an error kept it from entering
        return
    outer = run.outer
    if outer is not None and outer.stages is not None and run.stages is not None and run.stages is not outer.stages:
        for time, lengths in run.stages.items():  # what came out of a part goes on in the whole
            _note(outer.stages, time, lengths)
    _RUN.set(outer)


def _stages() -> dict[int, Tensor | None] | None:
    run = _RUN.get()
    return None if run is None else run.stages


def _note(stages: dict[int, Tensor | None], time: int, lengths: Tensor | None) -> None:
    """The lengths of this padded size. Two that differ are None: which of them a tensor has, its size does not say."""
    known = stages.get(time, lengths)
    stages[time] = lengths if known is not None and lengths is not None and torch.equal(known, lengths) else None


def _silence(
    name: str, axis: int, fill: float, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a layer that looks in time: what stands behind the end is what would stand there alone."""
    x: Tensor = args[0] if args else kwargs["input"]
    lengths = _lengths(module, name, x, axis)
    if lengths is None:
        return None
    x = _emptied(x, lengths, axis, fill)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})


def _carry(
    name: str, axis: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
) -> Tensor | None:
    """After it: the lengths that come out, and nothing behind them."""
    stages = _stages()
    if stages is None:
        return None
    x: Tensor = args[0] if args else kwargs["input"]
    lengths = _lengths(module, name, x, axis)
    assert lengths is not None
    both = torch.cat([lengths, lengths.new_tensor([x.shape[axis]])])
    *_, padded = ahead = frame_lengths(both, module, axis=axis - 2)
    if int(padded) != y.shape[axis]:
        received = f"{name}: {module} gave {y.shape[axis]} steps of {x.shape[axis]}"
        raise ShapeError(say(f"this layer gives {int(padded)} steps", received=received, instead="no output_size"))
    _note(stages, y.shape[axis], ahead[:-1])
    return _emptied(y, ahead[:-1], axis, 0.0)


def _masked_attention(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Attention looks at all of time: somebody has to tell it what is padding."""
    masks = (*args[3:4], *args[5:6], kwargs.get("key_padding_mask"), kwargs.get("attn_mask"))
    stages = _stages()
    if stages is None or any(mask is not None for mask in masks):
        return
    if any(lengths is None or bool((lengths < time).any()) for time, lengths in stages.items()):
        raise SpecError(
            say(
                "attention over padded sequences is told what is padding",
                received=f"{name}: {module} without key_padding_mask",
                instead="a forward that makes key_padding_mask of its lengths",
            )
        )


def _apart_from_time(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A layer of one axis, which must not be time."""
    stages, x = _stages(), args[0] if args else kwargs["input"]
    axis = getattr(module, "dim", -1) % x.dim()
    if stages is not None and x.dim() == 3 and axis > 0 and x.shape[axis] in stages and x.shape[3 - axis] not in stages:
        raise SpecError(
            say(
                "a layer that mixes time cannot be made padding-proof",
                received=f"{name}: {module}, x of shape {tuple(x.shape)}, time is axis {axis}",
                instead="nn.GLU(dim=1), if these are (batch, channels, time); a transposed x",
            )
        )


def _lengths(module: nn.Module, name: str, x: Tensor, axis: int) -> Tensor | None:
    """The valid lengths of x, whose time is `axis`; None if the model runs without lengths."""
    stages = _stages()
    if stages is None:
        if torch._C._current_graph_task_id() != -1 and getattr(module, "_had_lengths", False):
            raise RuntimeError(
                say(
                    "this layer is computed again by activation checkpointing, and the lengths are gone",
                    received=f"{name}: {module}",
                    instead="no checkpointing of padding-proof models",
                )
            )
        module._had_lengths = False  # type: ignore[assignment]
        return None
    module._had_lengths = True  # type: ignore[assignment]
    time = x.shape[axis] if axis < x.dim() else -1
    lengths = stages.get(time)
    if lengths is not None and lengths.numel() == x.shape[0]:
        return lengths
    seen = f"{name}: {module} sees {time} steps, x of shape {tuple(x.shape)}"
    if lengths is not None:
        rule = f"every layer sees the sequences of the batch, {lengths.numel()}"
        instead = "a model that does not fold time or channels into the batch"
    elif time in stages:
        rule = "the number of steps says how long the sequences are"
        seen += ": layers before gave as many, of sequences of different lengths"
        instead = "strides that do not meet in one size, or another size of the input"
    else:
        rule = "every layer sees as many steps as the input has, or as a layer before it gave"
        seen += f"; known: {', '.join(map(str, stages))}"
        instead = "time_dim=, if time is another axis of the input; if something between the layers cuts or pads time, "
        instead += "that cannot be followed"
    raise ShapeError(say(rule, received=seen, instead=instead))


def _rows_are_sequences(module: nn.Module, name: str, x: Tensor) -> None:
    """Rows without time are one of each sequence; batch norm of the steps of all would count the padding."""
    known = [lengths for lengths in (_stages() or {}).values() if lengths is not None]
    if isinstance(module, nn.BatchNorm1d) and known and x.shape[0] != known[0].numel():
        rule = f"rows without time are one of each sequence: {known[0].numel()}"
        received = f"{name}: {module} sees {x.shape[0]} rows"
        raise ShapeError(say(rule, received=received, instead="(batch, channels, time) for the batch norm"))


def _prefix(lengths: Tensor, time: int) -> Tensor:
    return torch.arange(time, device=lengths.device) < lengths[:, None]


def _emptied(x: Tensor, lengths: Tensor, axis: int, fill: float) -> Tensor:
    """x with `fill` behind the end of every sequence."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = x.shape[0], x.shape[axis]
    return x.masked_fill(~_prefix(lengths, x.shape[axis]).reshape(shape), fill)


# --- layers that look in time ----------------------------------------------------------------------------------------


_ONE_D = (nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d)
_TWO_D = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def _fill(layer: nn.Module) -> float:
    """What stands around a sequence alone."""
    return -math.inf if isinstance(layer, (nn.MaxPool1d, nn.MaxPool2d)) else 0.0


# --- norms -----------------------------------------------------------------------------------------------------------


class _Masked(Norm):
    """A norm that asks for the valid part of its input."""

    _name: str
    _axis: int

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # the signature of the layer it replaces
        return super().forward(input)

    def fit_call(self, call: Call) -> Call:
        """The valid part of x as a mask."""
        x = call.x
        if x.dim() < 3:
            _rows_are_sequences(self, self._name, x)
            return call
        axis = 2 if x.dim() == 3 else self._axis
        lengths = _lengths(self, self._name, x, axis)
        if lengths is None:
            return call
        valid = _prefix(lengths, x.shape[axis])
        shape = [1] * (x.dim() - 1)
        shape[0], shape[axis - 1] = valid.shape
        return call._replace(mask=valid.reshape(shape).expand(x.shape[0], *x.shape[2:]))

    @classmethod
    def of(cls, layer: Any, name: str, axis: int) -> _Masked:
        """The counterpart of a torch layer, with its own parameters, buffers, hooks and attributes."""
        new = cls.like(layer)
        attributes = {
            key: value for key, value in layer.__dict__.items() if key not in ("_parameters", "_buffers", "_modules")
        }
        new.__dict__.update(attributes)
        for key, value in (*layer._parameters.items(), *layer._buffers.items()):
            (new._parameters if key in layer._parameters else new._buffers)[key] = value
        new._name, new._axis = name, axis
        return new

    @classmethod
    def like(cls, layer: Any) -> _Masked:
        """A new one for the same channels."""
        raise TypeError  # each subclass says how


class _GroupNorm(_Masked, nn.GroupNorm):
    @classmethod
    def like(cls, layer: nn.GroupNorm) -> _GroupNorm:
        new = cls.__new__(cls)
        Norm.__init__(
            new,
            "b (g c) ..., b ... -> b g",
            affine="(g c)" if layer.affine else None,
            g=layer.num_groups,
            sizes={"(g c)": layer.num_channels},
            device="meta",
        )
        return new

    extra_repr = nn.GroupNorm.extra_repr


class _Channelwise(_Masked):
    """Instance and batch norm: each channel alone."""

    running_statistics = RunningStatistics(unseen=True)
    pattern: str

    @classmethod
    def like(cls, layer: Any) -> _Channelwise:
        new = cls.__new__(cls)
        Norm.__init__(
            new,
            cls.pattern,
            affine="c" if layer.affine else None,
            c=layer.num_features,
            track_running_stats=layer.track_running_stats,
            momentum=layer.momentum,
            device="meta",
        )
        return new

    extra_repr = nn.BatchNorm1d.extra_repr


class _InstanceNorm1d(_Channelwise, nn.InstanceNorm1d):
    pattern = "b c ..., b ... -> b c"


class _InstanceNorm2d(_Channelwise, nn.InstanceNorm2d):
    pattern = "b c ..., b ... -> b c"


class _BatchNorm1d(_Channelwise, nn.BatchNorm1d):
    pattern = "b c ..., b ... -> c"


class _BatchNorm2d(_Channelwise, nn.BatchNorm2d):
    pattern = "b c ..., b ... -> c"


_MASKED: Mapping[type[nn.Module], type[_Masked]] = {
    nn.GroupNorm: _GroupNorm,
    nn.InstanceNorm1d: _InstanceNorm1d,
    nn.InstanceNorm2d: _InstanceNorm2d,
    nn.BatchNorm1d: _BatchNorm1d,
    nn.BatchNorm2d: _BatchNorm2d,
}


# --- what is known ---------------------------------------------------------------------------------------------------

_POINTWISE = (
    nn.Identity, nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.AlphaDropout, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.GLU,
)  # fmt: skip
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList)

# Read line by line: between the layers inside of them time is only transposed, and their attention masks what is
# padding itself. (module, class)
_READ = {
    "torchaudio.models.wav2vec2.model": {"Wav2Vec2Model"},
    "torchaudio.models.wav2vec2.components": {
        "ConvLayerBlock", "ConvolutionalPositionalEmbedding", "Encoder", "EncoderLayer", "FeatureExtractor",
        "FeatureProjection", "FeedForward", "LayerNorm", "SelfAttention", "Transformer",
    },
    "torchaudio.models.conformer": {"Conformer", "ConformerLayer", "_ConvolutionModule", "_FeedForwardModule"},
    "transformers.models.wav2vec2.modeling_wav2vec2": {
        "Wav2Vec2Attention", "Wav2Vec2Encoder", "Wav2Vec2EncoderLayer", "Wav2Vec2EncoderLayerStableLayerNorm",
        "Wav2Vec2EncoderStableLayerNorm", "Wav2Vec2FeatureEncoder", "Wav2Vec2FeatureProjection", "Wav2Vec2FeedForward",
        "Wav2Vec2ForCTC", "Wav2Vec2GroupNormConvLayer", "Wav2Vec2LayerNormConvLayer", "Wav2Vec2Model",
        "Wav2Vec2NoLayerNormConvLayer", "Wav2Vec2PositionalConvEmbedding", "Wav2Vec2SamePadLayer",
    },
}  # fmt: skip


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those that compute a parametrized weight, under every name they have."""
    for name, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" not in name.split("."):
            yield name, module


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch whose forward it runs, by the function: a subclass with a forward of its own is another."""
    if isinstance(module, Norm):
        return None
    known = (*_POINTWISE, *_CONTAINERS, *_ONE_D, *_TWO_D, *_MASKED, nn.MultiheadAttention)
    return next((k for k in known if isinstance(module, k) and _runs(module, k)), None)


def _runs(module: Any, kind: Any) -> bool:
    """Whether the module computes what this class of torch does: no method on the way is another."""
    own = type(module)
    ways = ("forward", "__call__", "_conv_forward")
    same = all(getattr(own, way, None) is getattr(kind, way, None) for way in ways)
    return same and "forward" not in module.__dict__


def _check(name: str, module: nn.Module, trusted: tuple[type[nn.Module], ...]) -> None:
    """Raises, unless it is known what a layer does with time."""
    kind = _kind(module)
    reason: str | None = None
    layer: Any = module
    if isinstance(module, trusted) or type(module).__name__ in _READ.get(type(module).__module__, ()):
        return
    if kind is None:
        pointwise = type(module).__module__ == "transformers.activations" or isinstance(module, _Masked)
        reason = None if pointwise else "its class is not known"
    elif kind in (nn.LayerNorm, nn.RMSNorm) and len(layer.normalized_shape) > 1:
        reason = "it normalizes several axes, and one of them may be time"
    elif kind in (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d) and layer.padding_mode != "zeros":
        reason = f"its padding is {layer.padding_mode!r} and not zeros"
    elif kind in (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d) and layer.ceil_mode:
        reason = "with ceil_mode its last window depends on the end"
    elif kind in (nn.MaxPool1d, nn.MaxPool2d) and layer.return_indices:
        reason = "its indices count from the beginning of the padded batch"
    elif kind in _MASKED and (type(module) is not kind or not set(module._parameters) <= {"weight", "bias"}):
        reason = "to replace it would lose what it adds to its class"
    elif kind in (nn.AvgPool1d, nn.AvgPool2d) and any(_each(layer.padding)) and not layer.count_include_pad:
        reason = "without count_include_pad its divisor depends on the end"
    elif kind in (nn.InstanceNorm1d, nn.InstanceNorm2d) and layer.track_running_stats:
        reason = "running statistics of an instance norm average over sequences"
    if reason is not None:
        raise SpecError(
            say(
                "a layer that may mix time in a way that is not known cannot be made padding-proof",
                received=f"{name or 'the model'}: {type(module).__module__}.{type(module).__qualname__}; {reason}",
                instead=f"padding_proof(model, trusted=[{type(module).__name__}]), if it leaves time alone or masks "
                "padding itself",
            )
        )


def _each(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else value


def _arguments(model: nn.Module) -> tuple[str, ...]:
    """The names by which `forward` takes what is valid."""
    parameters = inspect.signature(type(model).forward).parameters
    names = tuple(name for name in ("lengths", "attention_mask") if name in parameters)
    if not names:
        raise SpecError(
            say(
                "a model that is told what is valid takes `lengths` or `attention_mask` in its forward",
                received=f"{type(model).__name__}.forward({', '.join(list(parameters)[1:])})",
                instead="def forward(self, x, lengths=None), in a subclass that hands x on",
            )
        )
    return names
