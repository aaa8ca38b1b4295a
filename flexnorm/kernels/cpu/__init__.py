"""The canonical form on CPU, in C++: forward and backward in one pass over what a cache holds.

The library beside this file is built when the package is installed (setup.py), from the .cpp and .h files beside it. It
knows nothing of torch: it takes addresses, and its threads are those of the OpenMP runtime that torch has loaded.
Functions of the interface are documented there.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...canonical import Column, Dim, Form
from ...statistics import Moments
from ..interface import Gradients, Kept, Operands, Recipe, Sums, stat_dtype

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS = {"one": 0, "each": 1, "table": 2}
ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3}
FORWARD, STATISTICS, APPLY, BACKWARD, BACKWARD_SUMS, BACKWARD_DX = range(6)
MOST_DIMS = 12


# --- the structs of form.h -------------------------------------------------------------------------------------------


class _Dim(ctypes.Structure):
    _fields_ = [("size", ctypes.c_int64), ("step", ctypes.c_int64 * 8)]


class _Column(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("kind", "table", "count", "offsets", "runs", "run_ptr", "mean_run", "blocks", "even")
    ]


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


NOWHERE = (0, 0, 0, 0, 0)  # nobody asks for the moments
_CALL = struct.Struct("=18q")  # what, threads, x, dy, y, mask, weight, bias, mean, low, m2, count, count_wide, ...


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
        for operand in (sets, params):
            for label in () if operand is None else operand.labels.values():
                label.check()  # a kernel reads memory where an id says
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
        new = torch.empty_like if not sets.merges else torch.zeros_like  # of labels, no value may be left out
        like = torch.empty((3, *self.shape), dtype=self.dtype)
        counts = torch.empty(self.shape, dtype=self.dtype if self.weighted else torch.int64)
        # Memory for mean, low and M2 of every set, side by side; and for the count, if sets differ in it.
        self.new_moments: Callable[[], Kept] = (lambda: (new(like),)) if dense else (lambda: (new(like), new(counts)))
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
            packed.blocks = table.shape[0]
            packed.even = table.shape[1] % 8 == 0 and not (runs % 8).any()
        return packed

    # --- tensors as the kernels take them

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """dy, with the strides of y."""
        if dy.stride() == self.y_stride and dy.dtype == x.dtype:
            return dy
        return torch.empty_like(x).copy_(dy)

    def wide(self, t: Tensor | None) -> Tensor | None:
        """A parameter or weights."""
        if t is None or (t.dtype == self.dtype and t.is_contiguous()):
            return t
        return t.to(self.dtype).contiguous()

    def operands(self, operands: Operands) -> Operands:
        x, mask, weight, bias = operands
        if mask is not None:
            mask = self.wide(mask) if self.weighted else mask.contiguous()
        if self.copied:
            x = torch.empty_like(x).copy_(x)
        return Operands(x, mask, self.wide(weight), self.wide(bias))

    def places(self, kept: Kept) -> tuple[int, int, int, int, int]:
        """Where mean, low, M2 and count lie, and whether the count is floating."""
        at = kept[0].data_ptr()
        size = self.n_sets * self.size
        if len(kept) == 1:
            return at, at + size, at + 2 * size, 0, 0
        return at, at + size, at + 2 * size, kept[1].data_ptr(), kept[1].is_floating_point()

    def keep(self, m: Moments) -> Kept:
        """Moments from anywhere."""
        low = torch.zeros_like(m.mean) if m.low is None else m.low
        packed = torch.stack([t.to(self.dtype).expand(self.shape) for t in (m.mean, low, m.m2)])
        packed = packed.contiguous()  # stacked, tensors that lie as channels-last still do
        if m.count is self.count:
            return (packed,)
        count = m.count if m.count.dtype == torch.int64 else m.count.to(self.dtype)
        return packed, count.expand(self.shape).contiguous()

    def call(
        self,
        what: int,
        operands: Operands,
        y: Tensor | None,
        places: tuple[int, int, int, int, int],
        dy: Tensor | None = None,
        dmask: Tensor | None = None,
        dweight: Tensor | None = None,
        dbias: Tensor | None = None,
        sums: Sequence[Tensor] = (),
    ) -> None:
        x, mask, weight, bias = operands
        packed = _CALL.pack(
            what,
            torch.get_num_threads(),
            x.data_ptr(),
            0 if dy is None else dy.data_ptr(),
            0 if y is None else y.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            *places,
            0 if dmask is None else dmask.data_ptr(),
            0 if dweight is None else dweight.data_ptr(),
            0 if dbias is None else dbias.data_ptr(),
            sums[0].data_ptr() if sums else 0,
            sums[1].data_ptr() if sums else 0,
        )
        if self.run(self.at, packed):
            raise MemoryError("flexnorm: no memory for the sums of a kernel")


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


def evaluate(recipe: Recipe, operands: Operands) -> Tensor:
    p = _program(recipe, operands.x)
    y = torch.empty_like(operands.x)
    p.call(FORWARD, p.operands(operands), y, NOWHERE)
    return y


def forward(recipe: Recipe, operands: Operands) -> tuple[Tensor, Kept]:
    p = _program(recipe, operands.x)
    y = torch.empty_like(operands.x)
    kept = p.new_moments()
    p.call(FORWARD, p.operands(operands), y, p.places(kept))
    return y, kept


def moments(recipe: Recipe, operands: Operands, kept: Kept) -> Moments:
    mean, low, m2 = kept[0].unbind()
    count = _program(recipe, operands.x).count if len(kept) == 1 else kept[1]
    return Moments(count, mean, m2, low)  # type: ignore[arg-type]


def keep(recipe: Recipe, operands: Operands, moments: Moments) -> Kept:
    return _program(recipe, operands.x).keep(moments)


def statistics(recipe: Recipe, operands: Operands) -> Moments:
    p = _program(recipe, operands.x)
    kept = p.new_moments()
    p.call(STATISTICS, p.operands(Operands(operands.x, operands.mask)), None, p.places(kept))
    return moments(recipe, operands, kept)


def apply(recipe: Recipe, operands: Operands, moments: Moments) -> Tensor:
    p = _program(recipe, operands.x)
    y = torch.empty_like(operands.x)
    kept = p.keep(moments)
    p.call(APPLY, p.operands(operands), y, p.places(kept))
    return y


def backward(recipe: Recipe, operands: Operands, kept: Kept, dy: Tensor, *, of_mask: bool = True) -> Gradients:
    x, mask, weight, bias = operands
    p = _program(recipe, x)
    dx = torch.empty_like(x)
    wide = p.operands(operands)
    dmask, dweight, dbias = _gradients(p, wide, mask=of_mask)
    p.call(BACKWARD, wide, dx, p.places(kept), p.gradient(dy, x), dmask, dweight, dbias)
    return Gradients(dx, _as(dmask, mask), _as(dweight, weight), _as(dbias, bias))


def backward_sums(recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor) -> Sums:
    p = _program(recipe, operands.x)
    kept = p.keep(moments)
    wide = p.operands(operands)
    _, dweight, dbias = _gradients(p, wide, mask=False)
    sums = grad, grad_xhat = torch.zeros((2, *p.shape), dtype=p.dtype).unbind()
    dy = p.gradient(dy, operands.x)
    p.call(BACKWARD_SUMS, wide, None, p.places(kept), dy, None, dweight, dbias, sums)
    return Sums(grad, grad_xhat, _as(dweight, operands.weight), _as(dbias, operands.bias))


def backward_dx(
    recipe: Recipe, operands: Operands, moments: Moments, dy: Tensor | None, sums: Sums | None
) -> tuple[Tensor, Tensor | None]:
    p = _program(recipe, operands.x)
    dx = torch.empty_like(operands.x)
    kept = p.keep(moments)
    wide = p.operands(operands)
    dmask = None if sums is None else _gradients(p, wide, mask=True)[0]
    both = () if sums is None else [t.to(p.dtype).expand(p.shape).contiguous() for t in sums[:2]]
    dy = None if dy is None else p.gradient(dy, operands.x)
    p.call(BACKWARD_DX, wide, dx, p.places(kept), dy, dmask, None, None, both)
    return dx, _as(dmask, operands.mask)


def _gradients(p: Program, wide: Operands, *, mask: bool) -> list[Tensor | None]:
    """Memory for the gradients of mask, weight and bias."""
    wanted = (wide.mask if p.weighted and mask else None, wide.weight, wide.bias)
    return [None if t is None else torch.empty_like(t) for t in wanted]


def _as(gradient: Tensor | None, operand: Tensor | None) -> Tensor | None:
    if gradient is None or operand is None or gradient.dtype == operand.dtype:
        return gradient
    return gradient.to(operand.dtype)
