"""`Norm`: the layer that keeps the state of a pattern: parameters, static labels, running statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Formula, Label, Options, Param, as_partition, check_eps, label_names, sort_names
from .axes import solve
from .context import given_here, something_given
from .errors import ShapeError, SpecError, say, shown
from .functional import run
from .partition import Partition, readable, whole
from .spec import Atom, Axis, Expr, Group, Lookup, Spec, keyword
from .statistics import Moments


class Norm(nn.Module):
    r"""A normalization layer: the elements that share statistics are those that its pattern names.

    For each set S:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

    Args:
        pattern: which elements share statistics: `"n (g c) ... -> n g"`. See `normalize`.
        affine: axes of the learned weight and bias: `"c"`, `"(g c)"` (flat, as in `nn.GroupNorm`), `"type[v] c"`.
            None: no parameters.
        conditional: axes of a further weight and bias that are given at every call, after the learned ones: `"b c"`.
        center: subtract the mean. Without it, the variance is that about zero (RMSNorm).
        scale: divide by the standard deviation.
        bias: learn a bias beside the weight.
        eps: added to the variance, in the unit of x squared.
        activation: "relu", "silu" or "gelu", applied to the result.
        track_running_stats: keep running means and (unbiased) variances of the sets while training, and use them in
            evaluation, as `nn.BatchNorm2d` does. All axes and labels of the statistics need a size.
        momentum: weight of the new value in the running statistics; None: the average of all batches.
        sizes: sizes of axes and compositions, for those that cannot be keywords: `{"(g c)": 256}`.
        labels: as keywords, for names that options have.
        device, dtype: of the parameters.
        **names: sizes of axes, as `g=32` (all axes of `affine` need one); and labels: a tensor of ids or a `Partition`
            for those that never change (persistent buffers, rebuilt by `reset_parameters()`), an int for the number of
            values of one that comes with every call.

    Shapes: x has the axes of the pattern's left side; the result has x's shape, dtype and memory format.

    Raises:
        SpecError: the pattern, a name or an option means nothing, or a size that `affine` needs is missing.

    >>> norm = Norm("n (g c) ... -> n g", affine="(g c)", g=4, sizes={"(g c)": 16})
    >>> norm
    Norm('n (g c) ... -> n g', g=4, sizes={'(g c)': 16}, affine='(g c)', weight=[16], bias=[16])
    >>> norm(torch.randn(2, 16, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    >>> norm = Norm("v c -> graph[v] c", affine="c", c=8)
    >>> norm(torch.randn(6, 8), graph=torch.tensor([0, 0, 0, 1, 1, 1])).shape
    torch.Size([6, 8])
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        /,
        pattern: str,
        *,
        affine: str | None = None,
        conditional: str | None = None,
        center: bool = True,
        scale: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        activation: str | None = None,
        track_running_stats: bool = False,
        momentum: float | None = 0.1,
        sizes: Mapping[str, int] | None = None,
        labels: Mapping[str, int | Label] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **names: int | Label,
    ) -> None:
        nn.Module.__init__(self)  # not that of a class beside this one, as drop-ins have
        self._spec = Spec.parse(pattern)
        self._options = Options(center, scale, eps, activation)
        self.eps = eps
        if not isinstance(bias, bool) or (dtype is not None and not dtype.is_floating_point):
            received = f"bias={shown(bias)}, dtype={dtype}"
            rule, instead = "bias is True or False, and dtype a floating type", "bias=False, dtype=torch.float32"
            raise SpecError(say(rule, received=received, instead=instead))
        self._affine = None if affine is None else self._spec.read(affine, "affine")
        self._conditional = None if conditional is None else self._spec.read(conditional, "conditional")
        self._lookups = label_names(self._spec, self._affine, self._conditional)
        self._sizes, told = sort_names(self._spec, [self._affine, self._conditional], sizes, labels, names)
        check_eps(self._spec, eps, self._sizes, told)
        self._counts = {
            name: whole(value, f"the number of values of label {name!r}")
            for name, value in told.items()
            if not isinstance(value, (Tensor, Partition)) and hasattr(value, "__index__")
        }
        self._static = {
            name: self._as_partition(name, value) for name, value in told.items() if name not in self._counts
        }
        self._built: dict[str, tuple[Tensor, int, Partition]] = {}
        for name, partition in self._static.items():
            self._counts[name] = partition.count
            self.register_buffer(_buffer(name), torch.empty(partition.shape, dtype=torch.int64, device=device))
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if self._affine is not None:
            shape = self._fixed_shape(self._affine, "the parameters")
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            if bias:
                self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        exprs = [expr for expr in (self._affine, self._conditional) if expr is not None]
        self._formula = Formula(self._spec, self._options, exprs, self._sizes)
        self._was_given = False
        self.momentum = _checked(momentum)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, None)
        self.track_running_stats = track_running_stats
        if track_running_stats:
            shape = self._fixed_shape(self._spec.sets, "running statistics")
            self.running_mean = torch.empty(shape, device=device, dtype=dtype)
            self.running_var = torch.empty(shape, device=device, dtype=dtype)
            self.num_batches_tracked = torch.empty((), device=device, dtype=torch.int64)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch seen."""
        for buffer, value in ((self.running_mean, 0), (self.running_var, 1), (self.num_batches_tracked, 0)):
            if buffer is not None:
                buffer.fill_(value)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running statistics as at first, and the static labels as the layer was built with."""
        self.reset_running_stats()
        with torch.no_grad():
            if self.weight is not None:
                nn.init.ones_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            for name, partition in self._static.items():
                self.get_buffer(_buffer(name)).copy_(partition.ids)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        moments: Moments | None = None,
        labels: Mapping[str, Label] | None = None,
        **names: Label,
    ) -> Tensor:
        """Normalizes x.

        Args:
            x: with the axes of the pattern's left side.
            mask: bool (membership) or floating (weights), over the axes behind the comma.
            weight, bias: over the axes of `conditional`, applied after the learned ones.
            moments: statistics to use instead of x's own.
            labels, **names: the labels that are no part of the layer.
        """
        dynamic: dict[str, Label] = names if labels is None else self._both(names, labels)
        if not (something_given() or self._was_given):
            return self._normalize(x, mask, weight, bias, moments, dynamic)
        around = given_here()
        from_around: list[str] = []
        if around:
            if mask is None and self._spec.mask is not None and "mask" in around:
                mask = around["mask"]
                from_around.append("mask")
            for name in self._lookups:
                if name in around and name not in dynamic and name not in self._static and name != "mask":
                    dynamic[name] = around[name]
                    from_around.append(name)
        self._check_recomputation(bool(from_around))
        try:
            return self._normalize(x, mask, weight, bias, moments, dynamic)
        except (SpecError, ShapeError) as error:
            if not around:
                raise
            raise type(error)(f"{error}\n  in:       {self}, inside of given({', '.join(around)})") from None

    def _both(self, names: Mapping[str, Label], labels: Mapping[str, Label]) -> dict[str, Label]:
        for name in names:
            if name in labels:
                received, instead = f"{name}={shown(names[name])}, and again in labels=", "leave one out"
                raise SpecError(
                    say(f"{name!r} is given once", text=self._spec.text, received=received, instead=instead)
                )
        return {**names, **labels}

    def _normalize(
        self,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Moments | None,
        dynamic: Mapping[str, Any],
    ) -> Tensor:
        partitions = self.labels if self._static else {}
        for name, value in dynamic.items():
            if name not in self._lookups or name in self._static:
                raise self._refused(name, value)
            partitions[name] = self._as_partition(name, value, self._counts.get(name))
        params = self._params(weight, bias)
        running = None
        mean, var = self._buffers.get("running_mean"), self._buffers.get("running_var")
        if moments is None and mean is not None and var is not None:
            running = Moments(torch.ones_like(mean), mean, var)
        formula = self._formula
        if self.eps != formula.options.eps:  # somebody set it anew
            options = replace(self._options, eps=self.eps)
            formula = self._formula = Formula(self._spec, options, formula.affines, self._sizes)
        used = moments if self.training or running is None else running
        tracked = self.training and running is not None
        y, own = run(formula, x, mask, params, used, partitions, tracked=tracked)
        if own is not None and running is not None:
            self._track(running, own)
        return y

    @torch.no_grad()
    def _track(self, running: Moments, new: Moments) -> None:
        """Moves the running statistics towards those of this batch; empty sets, and variances of one element, stay."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_((new.count > 0).any())  # a batch of nothing is none
        momentum = 1 / max(float(self.num_batches_tracked), 1.0) if self.momentum is None else self.momentum
        for old, value, known in ((running.mean, new.mean, new.count > 0), (running.m2, *new.unbiased_var())):
            old.copy_(old.lerp(value.to(old.dtype), momentum).where(known, old))

    # --- parameters

    def _fixed_shape(self, expr: Expr, what: str) -> tuple[int, ...]:
        """The shape of a tensor over these axes, from what is told when the layer is built."""
        known: dict[Atom, int] = {Axis(name): size for name, size in solve(self._spec, self._sizes).items()}
        known.update(
            (lookup, self._counts[name]) for name, (_, lookup) in self._lookups.items() if name in self._counts
        )
        for atom in expr.atoms():
            if atom in known:
                continue
            if not isinstance(atom, (Axis, Lookup)):
                rule, instead = (
                    f"{what} have a fixed shape: their axes have names",
                    "names for these axes, and their sizes",
                )
                raise SpecError(expr.error(rule, atom, instead=instead))
            name = atom.name if isinstance(atom, Axis) else atom.label
            kind, where = (
                ("size of axis", "sizes") if isinstance(atom, Axis) else ("number of values of label", "labels")
            )
            told = {**self._sizes, **self._counts}
            holds = (str(e) for e in self._spec.x.elements if isinstance(e, Group) and atom in e.atoms)
            composed = next((f', or the size of all: sizes={{"{group}": 64}}' for group in holds), "")
            raise SpecError(
                expr.error(
                    f"{what} need the {kind} {name!r} when the layer is built",
                    atom,
                    received=", ".join(f"{k}={v}" for k, v in told.items()) or "no sizes",
                    instead=keyword(name, 8, where) + composed,
                )
            )
        return tuple(
            math.prod(known[atom] for atom in (element.atoms if isinstance(element, Group) else (element,)))
            for element in expr.elements
        )

    def _params(self, weight: Tensor | None, bias: Tensor | None) -> list[Param]:
        """The learned weight and bias, then the given ones."""
        params: list[Param] = []
        if self._affine is not None:
            own = self._parameters  # self.weight takes a microsecond; parametrizations move it elsewhere
            if "weight" in own and "bias" in own:
                params.append((own["weight"], own["bias"]))
            else:
                params.append((self.weight, self.bias))
        if self._conditional is None:
            if weight is not None or bias is not None:
                raise SpecError(
                    say(
                        "weight and bias are given at the call to a layer that was built for them",
                        text=self._spec.text,
                        received="weight" if bias is None else "bias" if weight is None else "weight and bias",
                        instead='Norm(..., conditional="b c"), with the axes of weight and bias',
                    )
                )
            return params
        if weight is None and bias is None:
            raise SpecError(
                self._conditional.error(
                    "a conditional layer is called with weight, bias, or both",
                    *self._conditional.elements,
                    received="neither",
                    instead="norm(x, weight=w, bias=b)",
                )
            )
        return [*params, (weight, bias)]

    # --- labels

    @property
    def labels(self) -> dict[str, Partition]:
        """The static labels, by name."""
        return {name: self._partition(name) for name in self._static}

    def _as_partition(self, name: str, value: object, count: int | None = None) -> Partition:
        return as_partition(*self._lookups[name], value, count)

    def _partition(self, name: str) -> Partition:
        """A static label, from its buffer; kept until the buffer is another one, or was written."""
        buffer = self.get_buffer(_buffer(name))
        if buffer.is_inference() or not readable(buffer):
            return self._as_partition(name, buffer, self._counts[name])
        kept = self._built.get(name)
        if kept is not None and kept[0] is buffer and kept[1] == buffer._version:
            return kept[2]
        if kept is not None and buffer.device.type == "cpu" and torch.equal(kept[2].ids, buffer):
            partition = kept[2]  # written, and the same: a checkpoint, or the broadcast of a parallel wrapper
        else:
            partition = self._as_partition(name, buffer, self._counts[name])
        self._built[name] = (buffer, buffer._version, partition)
        return partition

    def __getstate__(self) -> dict[str, Any]:
        """Without what is built from buffers: a copy's buffers count their versions anew."""
        return {**self.__dict__, "_built": {}}

    def _refused(self, name: str, value: object) -> SpecError:
        static = name in self._static
        return SpecError(
            say(
                f"{name!r} is a static label of this layer" if static else f"{name!r} is no label of this layer",
                text=self._spec.text,
                received=f"{name}={shown(value)}",
                instead=f"Norm(..., {name}={shown(value)}): sizes of axes are told when the layer is built"
                if any(axis.name == name for axis in self._spec.x.axes())
                else f"build the layer without {name}= to give it at every call"
                if static
                else f"one of: {', '.join(n for n in self._lookups if n not in self._static) or 'none'}",
            )
        )

    # --- what is given from around

    def _check_recomputation(self, given_now: bool) -> None:
        """Activation checkpointing runs forward again in backward: then what was given must still be."""
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:
            if self._was_given != given_now:
                self._was_given = given_now
        elif self._was_given and not given_now:
            raise RuntimeError(
                say(
                    "this layer is computed again by activation checkpointing, and what was given is gone",
                    received=f"{self}, outside of given(...)",
                    instead="checkpoint(..., context_fn=given.context_fn), or backward() inside of the with block",
                )
            )

    def extra_repr(self) -> str:
        """What `print(norm)` shows."""
        said = [repr(str(self._spec))]
        said += [f"{name}={size}" for name, size in self._sizes.items() if name.isidentifier()]
        compositions = {name: size for name, size in self._sizes.items() if not name.isidentifier()}
        said += [f"sizes={compositions}"] if compositions else []
        said += [f"{name}={self._static.get(name, count)}" for name, count in self._counts.items()]
        said += [f"{name}='{expr}'" for name, expr in self._exprs() if expr is not None]
        said += [f"{name}={list(p.shape)}" for name, p in self.named_parameters(recurse=False)]
        if self.track_running_stats:
            said.append(f"momentum={self.momentum}, track_running_stats=True")
        defaults = Options()
        for name in Options.__dataclass_fields__:
            value = self.eps if name == "eps" else getattr(self._options, name)
            if value != getattr(defaults, name):
                said.append(f"{name}={value!r}")
        return ", ".join(said)

    def _exprs(self) -> list[tuple[str, Expr | None]]:
        return [("affine", self._affine), ("conditional", self._conditional)]


def _checked(momentum: float | None) -> float | None:
    if momentum is not None and not (isinstance(momentum, (int, float)) and 0 <= momentum <= 1):
        raise SpecError(
            say(
                "momentum is the weight of the new value, from 0 to 1; None averages all batches alike",
                received=f"momentum={shown(momentum)}",
                instead="momentum=0.1",
            )
        )
    return momentum


def _buffer(label: str) -> str:
    return f"{label}_ids"
