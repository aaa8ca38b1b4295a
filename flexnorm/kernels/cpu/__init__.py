"""The canonical form on CPU, in C++: forward and backward in one pass over what a cache holds.

The library beside this file is built when the package is installed (setup.py), from the .cpp and .h files beside it. It
knows nothing of torch: it takes addresses, and its threads are those of the OpenMP runtime that torch has loaded.
Functions of the interface are documented there.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...canonical import Column, Dim, Form
from ...statistics import Moments
from ..interface import Gradients, Operands, Recipe, Sums, stat_dtype

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS = {"one": 0, "each": 1, "table": 2}
ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
FORWARD, STATISTICS, APPLY, BACKWARD, BACKWARD_SUMS, BACKWARD_DX = range(6)
MOST_DIMS = 12


# --- the structs of form.h -------------------------------------------------------------------------------------------


class _Dim(ctypes.Structure):
    _fields_ = [("size", ctypes.c_int64), ("step", ctypes.c_int64 * 8)]


class _Column(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("kind", "table", "count", "offsets", "runs", "run_ptr", "mean_run")]


class _Form(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "columns", "numel")),
        *((name, ctypes.c_int64) for name in ("n_outer", "n_inner", "n_segment", "outer_at", "inner_at")),
        *((name, _Dim * MOST_DIMS) for name in ("outer", "inner", "segment")),
        *((name, ctypes.c_int64) for name in ("offsets", "order", "segment_sets", "segment_step", "groups")),
        *((name, _Column) for name in ("sets", "mask", "params")),
        *((name, ctypes.c_int64) for name in ("param_label", "n_sets", "n_params", "n_mask", "injective")),
        *((name, ctypes.c_int64) for name in ("mask_kind", "center", "scale", "activation")),
        *((name, ctypes.c_double) for name in ("eps", "count")),
    ]


_CALL = struct.Struct("=19q")  # what, threads, x, dy, y, mask, weight, bias, mean, low, m2, count, count_wide, ...


@cache
def library() -> Any:
    """The compiled library, or why there is none. FLEXNORM_CPU=0 in the environment leaves it out."""
    if os.environ.get("FLEXNORM_CPU") == "0":
        return "the C++ kernels are left out by FLEXNORM_CPU=0"
    path = Path(__file__).with_name("_kernels.so")
    if not path.exists():
        return "the C++ kernels were not built: there was no compiler when flexnorm was installed"
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the C++ kernels cannot be loaded: {error}"
    found.flexnorm_run.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    found.flexnorm_size_of_form.restype = found.flexnorm_size_of_call.restype = ctypes.c_int64
    if found.flexnorm_size_of_form() != ctypes.sizeof(_Form) or found.flexnorm_size_of_call() != _CALL.size:
        return "the C++ kernels are those of another version: install flexnorm again"
    return found


def refusal(recipe: Recipe, operands: Operands) -> str | None:
    """Why this room cannot compute the recipe; None if it can."""
    x = operands.x
    if isinstance(found := library(), str):
        return found
    if x.device.type != "cpu":
        return "x is not on a CPU"
    if x.numel() == 0:
        return "x is empty"
    if x.dtype not in DTYPES:
        return f"there is no kernel for {x.dtype}"
    form = recipe.form(x)
    if max(len(form.outer), len(form.inner), 0 if form.segments is None else len(form.segments.axes)) >= MOST_DIMS:
        return f"x has more than {MOST_DIMS - 1} axes of one kind"
    return None


# --- a recipe for tensors of one layout ------------------------------------------------------------------------------


class Program:
    """What a call needs beside its tensors; made once for a recipe, a dtype and a layout."""

    def __init__(self, recipe: Recipe, x: Tensor, form: Form) -> None:
        sets, params, mask = recipe.sets, recipe.params, recipe.mask
        self.kept: list[Any] = [form]
        self.dtype = stat_dtype(x.dtype)
        self.size = self.dtype.itemsize
        self.copied = form.copied
        self.y_stride = torch.empty_like(x, device="meta").stride()
        self.shape = sets.internal_shape
        self.n_sets = sets.count
        self.weighted = mask is not None and not recipe.membership
        dense = mask is None and not sets.merges
        self.count = torch.full((1,) * len(self.shape), x.numel() // self.n_sets) if dense else None
        self.new = torch.empty if not sets.merges else torch.zeros  # of labels, no value may be left out
        self.form = _Form(
            dtype=DTYPES[x.dtype],
            columns=form.columns,
            numel=x.numel(),
            n_outer=len(form.outer),
            n_inner=len(form.inner),
            outer_at=form.segments_at[0],
            inner_at=form.segments_at[1],
            outer=_dims(form.outer),
            inner=_dims(form.inner),
            sets=self.column(form.sets),
            mask=self.column(form.mask),
            params=self.column(form.params),
            param_label=self.address(form.param_label),
            n_sets=self.n_sets,
            n_params=0 if params is None else params.count,
            n_mask=0 if mask is None else mask.count,
            injective=form.injective,
            mask_kind=0 if mask is None else 1 if recipe.membership else 2,
            center=recipe.center,
            scale=recipe.scale,
            activation=ACTIVATIONS[recipe.activation],
            eps=recipe.eps,
            count=0 if self.count is None else x.numel() // self.n_sets,
        )
        segments = form.segments
        if segments is not None:
            self.form.n_segment = len(segments.axes)
            self.form.segment = _dims(segments.axes)
            self.form.offsets = self.address(segments.offsets)
            self.form.order = self.address(segments.order)
            self.form.segment_sets = self.address(segments.sets)
            self.form.segment_step = segments.step
            self.form.groups = segments.groups
        self.at = ctypes.addressof(self.form)
        self.run = library().flexnorm_run

    def address(self, t: Tensor | None) -> int:
        if t is None:
            return 0
        t = t.contiguous()
        self.kept.append(t)
        return t.data_ptr()

    def column(self, column: Column) -> _Column:
        packed = _Column(kind=KINDS[column.kind], count=column.count, offsets=self.address(column.offsets))
        if column.table is not None:
            table = column.table
            first = torch.ones_like(table, dtype=torch.bool)
            first[:, 1:] = table[:, 1:] != table[:, :-1]
            runs = first.nonzero()[:, 1].to(torch.int32)
            packed.table, packed.runs = self.address(table), self.address(runs)
            packed.run_ptr = self.address(torch.nn.functional.pad(first.sum(1).cumsum(0), (1, 0)))
            packed.mean_run = table.numel() // runs.numel()
        return packed

    # --- tensors as the kernels take them

    def input(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x) if self.copied else x

    def output_like(self, t: Tensor, x: Tensor) -> Tensor:
        """dy, with the strides of y."""
        if t.stride() == self.y_stride and t.dtype == x.dtype:
            return t
        return torch.empty_like(x).copy_(t)

    def wide(self, t: Tensor | None) -> Tensor | None:
        """A parameter or weights."""
        return None if t is None else t.to(self.dtype).contiguous()

    def mask(self, mask: Tensor | None) -> Tensor | None:
        return self.wide(mask) if self.weighted else None if mask is None else mask.contiguous()

    def moments(self, m: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Mean, low, M2 and count (None if the form knows it)."""
        low = torch.zeros_like(m.mean) if m.low is None else m.low
        count = None if m.count is self.count else m.count.expand(self.shape).contiguous()
        if count is not None and count.dtype not in (torch.int64, self.dtype):
            count = count.to(self.dtype)
        mean, low, m2 = (t.to(self.dtype).expand(self.shape).contiguous() for t in (m.mean, low, m.m2))
        return mean, low, m2, count

    def call(
        self,
        what: int,
        x: Tensor,
        y: Tensor | None,
        operands: Operands,
        moments: tuple[Tensor, Tensor, Tensor, Tensor | None],
        *,
        dy: Tensor | None = None,
        dmask: Tensor | None = None,
        dweight: Tensor | None = None,
        dbias: Tensor | None = None,
        sums: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        mean, low, m2, count = moments
        packed = _CALL.pack(
            what,
            torch.get_num_threads(),
            x.data_ptr(),
            _at(dy),
            _at(y),
            _at(operands.mask),
            _at(operands.weight),
            _at(operands.bias),
            mean.data_ptr(),
            low.data_ptr(),
            m2.data_ptr(),
            _at(count),
            count is not None and count.is_floating_point(),
            _at(dmask),
            _at(dweight),
            _at(dbias),
            *((0, 0) if sums is None else (sums[0].data_ptr(), sums[1].data_ptr())),
            0,
        )
        if self.run(self.at, packed):
            raise MemoryError("flexnorm: no memory for the sums of a kernel")


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _dims(dims: tuple[Dim, ...]) -> Any:
    steps = ("x", "y", "set", "mask", "param", "set_block", "param_block", "param_label")
    packed = (_Dim(dim.size, (ctypes.c_int64 * 8)(*(getattr(dim, step) for step in steps))) for dim in dims)
    return (_Dim * MOST_DIMS)(*packed)


def _program(recipe: Recipe, x: Tensor) -> Program:
    key = (x.dtype, x.stride())
    found: Program | None = recipe.programs.get(key)
    if found is None:
        found = recipe.programs[key] = Program(recipe, x, recipe.form(x))
    return found


# --- the entry points ------------------------------------------------------------------------------------------------


def forward(recipe: Recipe, operands: Operands) -> tuple[Tensor, Moments]:
    x, mask, weight, bias = operands
    p = _program(recipe, x)
    y = torch.empty_like(x)
    operands = Operands(x, p.mask(mask), p.wide(weight), p.wide(bias))
    moments = _own(p, FORWARD, y, operands)
    return y, moments


def statistics(recipe: Recipe, operands: Operands) -> Moments:
    p = _program(recipe, operands.x)
    return _own(p, STATISTICS, None, Operands(operands.x, p.mask(operands.mask)))


def _own(p: Program, what: int, y: Tensor | None, operands: Operands) -> Moments:
    mean, low, m2 = p.new((3, *p.shape), dtype=p.dtype).unbind()
    count = None if p.count is not None else p.new(p.shape, dtype=p.dtype if p.weighted else torch.int64)
    p.call(what, p.input(operands.x), y, operands, (mean, low, m2, count))
    return Moments(p.count if count is None else count, mean, m2, low)  # type: ignore[arg-type]


def apply(recipe: Recipe, operands: Operands, moments: Moments) -> Tensor:
    x, mask, weight, bias = operands
    p = _program(recipe, x)
    y = torch.empty_like(x)
    p.call(APPLY, p.input(x), y, Operands(x, p.mask(mask), p.wide(weight), p.wide(bias)), p.moments(moments))
    return y


def backward(recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor) -> Gradients:
    dx, dmask, sums = _backward(BACKWARD, recipe, operands, moments, dy, None)
    return Gradients(dx, dmask, sums.weight, sums.bias)


def backward_sums(recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor) -> Sums:
    return _backward(BACKWARD_SUMS, recipe, operands, moments, dy, None)[2]


def backward_dx(
    recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor, sums: Sums | None
) -> tuple[Tensor, Tensor | None]:
    return _backward(BACKWARD_DX, recipe, operands, moments, dy, sums)[:2]


def _backward(
    what: int, recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor, sums: Sums | None
) -> tuple[Tensor, Tensor | None, Sums]:
    x, mask, weight, bias = operands
    p = _program(recipe, x)
    given = Operands(x, p.mask(mask), p.wide(weight), p.wide(bias))
    dx = torch.empty_like(x) if what != BACKWARD_SUMS else None
    wanted = what != BACKWARD_DX
    dmask = p.wide(torch.empty(mask.shape)) if mask is not None and p.weighted and dx is not None else None
    dweight, dbias = (torch.empty(t.shape, dtype=p.dtype) if t is not None and wanted else None for t in (weight, bias))
    pair = None
    if what == BACKWARD_SUMS:
        grad, grad_xhat = torch.zeros((2, *p.shape), dtype=p.dtype).unbind()
        pair = (grad, grad_xhat)
    elif sums is not None:
        pair = (sums.grad.expand(p.shape).contiguous(), sums.grad_xhat.expand(p.shape).contiguous())
    p.call(
        what,
        p.input(x),
        dx,
        given,
        p.moments(moments),
        dy=p.output_like(dy, x),
        dmask=dmask,
        dweight=dweight,
        dbias=dbias,
        sums=pair,
    )
    if dmask is not None and mask is not None:
        dmask = dmask.to(mask.dtype)
    if dweight is not None and weight is not None:
        dweight = dweight.to(weight.dtype)
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    grads = pair if pair is not None else (moments.mean, moments.mean)
    return dx if dx is not None else x, dmask, Sums(*grads, dweight, dbias)
