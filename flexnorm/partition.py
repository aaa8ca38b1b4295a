"""`Partition`: a label for every element of some axes, with what is costly about labels computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_dynamo_compiling
from torch.utils import _pytree as pytree

from .errors import ShapeError, SpecError, as_int, say, shown
from .library import library
from .watching import unwatched

Packed = tuple[Tensor, int, Tensor, Tensor | None]  # ids, count, offsets, order (None: the ids are sorted)


@dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """Says which group every element of some axes belongs to: ids from 0 to `count` - 1, in any order.

    A label of a pattern, `graph` in `"v c -> graph[v] c"`, is given as a `Partition` or as the tensor of its ids.
    A `Partition` is made once and then serves every layer: it keeps `counts`, `order` and `offsets`.
    It is immutable, a pytree of one tensor, and it pickles, moves and pins. The tensors that it hands out are copies.

    Args:
        ids: integer tensor of any shape (an axis of it for every name in the label's brackets). It is copied, as int64.
        count: number of groups, empty ones included. Without it, max(ids) + 1, which waits once for the device.

    Raises:
        SpecError: ids is no integer tensor, count is no whole number.
        ShapeError: an id is negative or not below count. On a GPU, with count given, that is a device-side assertion.

    >>> graph = Partition(torch.tensor([0, 0, 2, 0]), count=3)
    >>> graph
    Partition(4 ids, count=3)
    >>> graph.counts
    tensor([3, 0, 1])
    >>> Partition.from_sizes([1, 2]).ids
    tensor([0, 1, 1])
    """

    _ids: Tensor
    count: int

    def __init__(self, ids: Tensor, count: int | None = None) -> None:
        if unwatched(ids) and (packed := _grouped(ids, count)) is not None:
            own = self.__dict__
            own["_ids"], own["count"], own["_read"] = packed[0], packed[1], packed
            return
        _check_integers(ids, "ids")
        ids = ids.detach().to(
            torch.int64, copy=True, memory_format=torch.contiguous_format
        )  # a copy: nobody can change it behind our back
        least = (int(ids.max()) + 1 if ids.numel() else 0) if count is None else whole(count, "count")
        _check_range(ids, least)
        object.__setattr__(self, "_ids", ids)
        object.__setattr__(self, "count", least)

    @classmethod
    def from_sizes(cls, sizes: Sequence[int] | Tensor, *, device: torch.device | str | None = None) -> Partition:
        """Groups of consecutive elements, by their sizes: `[10, 20, 50]` are 80 elements in three groups.

        >>> Partition.from_sizes([2, 0, 1]).ids
        tensor([0, 0, 2])
        """
        sizes = _integers(sizes, "sizes", device)
        if sizes.numel() and bool((sizes < 0).any()):
            received = f"sizes={shown(sizes.tolist())}"
            raise ShapeError(say("sizes of groups are 0 or more", received=received, instead="sizes.clamp(min=0), say"))
        ids = torch.repeat_interleave(torch.arange(sizes.numel(), device=sizes.device), sizes)
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return cls._made(ids, sizes.numel(), (offsets, offsets[:0]))

    @classmethod
    def from_offsets(cls, offsets: Sequence[int] | Tensor, *, device: torch.device | str | None = None) -> Partition:
        """Groups of consecutive elements, by where each begins, and the end of the last: PyG's `ptr`, `cu_seqlens`.

        >>> Partition.from_offsets(torch.tensor([0, 2, 2, 3])) == Partition.from_sizes([2, 0, 1])
        True
        """
        offsets = _integers(offsets, "offsets", device)
        if offsets.numel() == 0 or int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
            raise ShapeError(
                say(
                    "offsets begin with 0, never fall, and end with the number of elements",
                    received=f"offsets={shown(offsets.tolist())}",
                    instead="Partition.from_sizes(sizes), if these are the sizes of the groups",
                )
            )
        return cls.from_sizes(offsets.diff())

    @classmethod
    def _made(cls, ids: Tensor, count: int, tables: tuple[Tensor, ...] = ()) -> Partition:
        """A Partition of ids known to be good: no check, no wait for the device. `tables`: see `_tables`."""
        made = object.__new__(cls)
        object.__setattr__(made, "_ids", ids)
        object.__setattr__(made, "count", count)
        if tables:
            object.__setattr__(made, "_came_with", tables)
        return made

    @classmethod
    def _between(cls, ends: Tensor, total: int) -> Partition:
        """`from_offsets` for so many elements, of offsets known to be good: it waits for no device."""
        places = torch.arange(total, dtype=ends.dtype, device=ends.device)
        last = max(ends.numel() - 2, 0)
        ids = torch.searchsorted(ends[1:].contiguous(), places, right=True).clamp(max=last)
        return cls._made(ids, ends.numel() - 1)

    # --- what is costly, once ----------------------------------------------------------------------------------------

    @property
    def ids(self) -> Tensor:
        """The group of every element: int64. A copy, which a kernel never reads; an edit of it is an error."""
        if type(self._ids) is not Tensor or torch.compiler.is_compiling():
            return self._ids
        handed: Tensor | None = self.__dict__.get("_handed")
        if handed is None:
            handed = self.__dict__["_handed"] = self._ids.clone()
            self.__dict__["_version"] = None if handed.is_inference() else handed._version
        return handed

    @property
    def _packed(self) -> Packed | None:
        """What a kernel on CPU reads, checked in one pass; None: there is no library, or no memory to read."""
        own = self.__dict__
        if "_read" not in own:
            if not unwatched(self._ids):  # for now: others may ask later
                return None
            own["_read"] = self._from_tables() or _grouped(self._ids.contiguous(), self.count)
            if own["_read"] is None:
                self.check()
        kept: Packed | None = own["_read"]
        return kept

    @property
    def _tables(self) -> tuple[Tensor, ...]:
        """Offsets and order, as an operator takes them; nothing, if they are not made yet. An order that is empty, or
        begins with -1, says that the ids are sorted. A tracer may ask, because nothing is made here."""
        own = self.__dict__
        tables: tuple[Tensor, ...] | None = own.get("_came_with")
        if tables is not None:
            return tables
        read: Packed | None = own.get("_read")
        if read is None:
            return ()
        return read[2], read[2][:0] if read[3] is None else read[3]

    def _settle(self) -> Partition:
        """Itself, with tables whose sizes do not say whether ids are sorted: so one graph serves other ids, too."""
        read = self._packed if self._ids.device.type == "cpu" else None
        if read is not None:
            with torch.inference_mode(False):  # a graph saves them for backward
                order = torch.full_like(self._ids.flatten(), -1) if read[3] is None else read[3]
            self.__dict__["_came_with"] = read[2], order
        return self

    def _from_tables(self) -> Packed | None:
        """What a kernel on CPU reads, if the tables came with the ids."""
        if "_came_with" not in self.__dict__ or isinstance(library(), str) or self._ids.device.type != "cpu":
            return None
        offsets, order = self._tables
        if offsets.numel() != self.count + 1 or order.numel() not in (0, self._ids.numel()):
            return None
        return self._ids.contiguous(), self.count, offsets, None if _says_sorted(order) else order

    @cached_property
    def counts(self) -> Tensor:
        """Number of elements of every group: int64 of shape (count,)."""
        return self._counted()

    def _counted(self) -> Tensor:  # by itself, as dynamo knows no lock, which cached_property has before Python 3.12
        if not torch.compiler.is_compiling() and self._packed is not None:
            return self._packed[2].diff()
        ones = torch.ones(self._ids.numel(), dtype=torch.int64, device=self._ids.device)
        zeros = torch.zeros(self.count, dtype=torch.int64, device=self._ids.device)
        return zeros.index_add(0, self._ids.flatten(), ones)

    @cached_property
    def offsets(self) -> Tensor:
        """Where every group begins in `order`, and the end of the last: int64 of shape (count + 1,)."""
        if self._packed is not None:
            return self._packed[2].clone()
        if "_came_with" in self.__dict__:
            return self._tables[0].clone()
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    @cached_property
    def order(self) -> Tensor:
        """The elements sorted by group, equal ones in their own order: indices into the flattened ids."""
        if self._packed is not None:
            order = self._packed[3]
            return torch.arange(self._ids.numel()) if order is None else order.clone()
        if "_came_with" in self.__dict__ and not _says_sorted(self._tables[1]):
            return self._tables[1].clone()
        return torch.argsort(self._ids.flatten(), stable=True)

    @cached_property
    def is_sorted(self) -> bool:
        """Whether the flattened ids never fall, so that `order` changes nothing. Waits once for the device."""
        if self._packed is not None:
            return self._packed[3] is None
        if "_came_with" in self.__dict__:
            return _says_sorted(self._tables[1])
        flat = self._ids.flatten()
        return bool((flat[1:] >= flat[:-1]).all())

    def check(self) -> None:
        """Raises, unless 0 <= id < count: of ids that came without a check, as from `torch.utils._pytree.tree_map`."""
        _check_range(self._ids, self.count)

    # --- a value -----------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self._ids.shape

    @property
    def device(self) -> torch.device:
        return self._ids.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Partition:
        """The same groups on a device. Itself, if it is there already."""
        return self._carried(self._ids.to(torch.device(device), non_blocking=non_blocking))

    def pin_memory(self) -> Partition:
        """The same groups in page-locked memory, as a `DataLoader` with `pin_memory=True` asks for."""
        return self._carried(self._ids.pin_memory())

    def _carried(self, ids: Tensor) -> Partition:
        return self if ids is self._ids else Partition._made(ids, self.count)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Partition):
            return NotImplemented
        return self.count == other.count and self.device == other.device and torch.equal(self._ids, other._ids)

    __hash__ = None  # type: ignore[assignment]  # equal by value, and the value is a tensor

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "1"
        where = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return f"Partition({shape} ids, count={self.count}{where})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._ids, self.count)


def _says_sorted(order: Tensor) -> bool:
    return not order.numel() or int(order[0]) < 0


def _rebuilt(ids: Tensor, count: int) -> Partition:
    return Partition._made(ids, count)


torch.serialization.add_safe_globals([_rebuilt])  # for torch.load(weights_only=True)
pytree.register_pytree_node(
    Partition,
    lambda partition: ([partition.ids], partition.count),
    lambda leaves, count: Partition._made(next(iter(leaves)), count),
    serialized_type_name="flexnorm.Partition",
    flatten_with_keys_fn=lambda partition: ([(pytree.GetAttrKey("ids"), partition.ids)], partition.count),
)


def packed(partition: Partition) -> Packed | None:
    """The labels as a kernel on CPU reads them; None: there is no library, or no memory to read.

    Raises:
        SpecError: somebody has changed what `partition.ids` handed out.
    """
    own = partition.__dict__
    version = own.get("_version")  # None: nothing was handed out, or an inference tensor, which counts no versions
    if version is not None and own["_handed"]._version != version:
        received = f"{partition!r}, whose ids were changed in place"
        raise SpecError(say("a Partition is immutable", received=received, instead="Partition(ids) of the new ids"))
    return partition._packed


Flat = tuple[list[str], list[Tensor], list[Tensor], list[int]]  # names, ids, tables, counts


def flat(labels: Iterable[tuple[str, Partition]]) -> Flat:
    """Labels as an operator takes them. Tables are two of each label, or none at all, if one label has none."""
    pairs = list(labels)
    tables = [partition._tables for _, partition in pairs]
    every = [table for both in tables for table in both] if all(len(both) == 2 for both in tables) else []
    return [name for name, _ in pairs], [p._ids for _, p in pairs], every, [p.count for _, p in pairs]


def partitions_of(ids: Sequence[Tensor], tables: Sequence[Tensor], counts: Sequence[int]) -> list[Partition]:
    """The reverse of `flat`, in the order of the names."""
    both = list(zip(tables[::2], tables[1::2], strict=True)) if tables else [()] * len(ids)
    return [Partition._made(*given) for given in zip(ids, counts, both, strict=True)]


def counts_for(partition: Partition, x: Tensor) -> Tensor:
    """The number of elements of every group, in the dtype of the statistics of x."""
    if unwatched(x) and (read := packed(partition)) is not None:
        found: Tensor | None = library().counts(read[2], x)
        if found is not None:
            return found
    return partition._counted().to(torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32)


def _grouped(ids: Tensor, count: object) -> Packed | None:
    """A copy of the ids, their number, offsets and order; None where Python has to look closer."""
    kernels = library()
    if isinstance(kernels, str) or not (count is None or type(count) is int):
        return None
    found: Packed | None
    if not torch.is_inference_mode_enabled():
        found = kernels.groups(ids, count)
        return found
    with torch.inference_mode(False):  # a graph saves them for backward
        found = kernels.groups(ids, count)
        return found


def _integers(values: Sequence[int] | Tensor, name: str, device: torch.device | str | None) -> Tensor:
    """A one-dimensional int64 tensor of a list, a tuple or a tensor."""
    if hasattr(values, "__array__") and not isinstance(values, Tensor):
        values = torch.as_tensor(values)
    if not isinstance(values, Tensor):
        listed = list(values) if isinstance(values, Iterable) else [None]
        numbers = [as_int(value) for value in listed]
        if any(number is None or abs(number) >= 2**63 for number in numbers):
            received, instead = f"{name}={shown(values)}", "Partition.from_sizes([2, 1]), say"
            raise SpecError(say(f"{name} are whole numbers", received=received, instead=instead))
        values = torch.tensor(numbers, dtype=torch.int64, device="cpu")  # whatever the default device is
    _check_integers(values, name)
    if values.dim() != 1:
        received = f"{name} of shape {tuple(values.shape)}"
        raise ShapeError(say(f"{name} have one axis", received=received, instead=f"{name}.flatten()"))
    return values.detach().to(device or values.device, torch.int64)


def _check_integers(ids: object, name: str) -> None:
    if not isinstance(ids, Tensor):
        raise SpecError(
            say(
                f"{name} are an integer tensor; a plain list could mean ids or sizes",
                received=f"{type(ids).__name__}: {shown(ids)}",
                instead="torch.tensor([0, 0, 1]) for ids, Partition.from_sizes([2, 1]) for sizes",
            )
        )
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise SpecError(
            say(f"{name} are integers", received=f"a tensor of {ids.dtype}", instead="convert it with .long()")
        )


def whole(value: object, name: str, least: int = 0) -> int:
    """The value as an int, if it is a whole number and not below `least`."""
    if is_dynamo_compiling() and isinstance(value, int) and not isinstance(value, bool):
        number: int | None = value  # a symbol, perhaps, of which dynamo does not say that it has an __index__
    else:
        number = as_int(value)
    if number is None or not least <= number < 2**63:
        rule, received = f"{name} is a whole number of {least} or more", f"{name}={shown(value)}"
        raise SpecError(say(rule, received=received, instead=f"{name}=8, say"))
    return number


def labelled(value: object, *, size: int | None = None, count: int | None = None) -> Partition | None:
    """The label of every place of an axis, in the ways of saying it; None of what is none of them.

    A list of sizes, a tensor of ids (of `count` values), a `Partition`; of an axis whose size is known, a number of
    parts, too: as equal as can be, the first ones larger.
    """
    number = as_int(value)
    if number is not None and size is not None and 0 < number <= size:
        least, more = divmod(size, number)
        return Partition.from_sizes([least + (part < more) for part in range(number)])
    if isinstance(value, (list, tuple)):
        return Partition.from_sizes(value)
    return Partition(value, count) if isinstance(value, Tensor) else value if isinstance(value, Partition) else None


def readable(t: Tensor) -> bool:
    """Whether there are values to look at: not on meta or fake tensors, nor while torch.func or a compiler traces."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not (traced or t.is_meta or isinstance(t, (FakeTensor, FunctionalTensor)))


def _check_range(ids: Tensor, count: int) -> None:
    """0 <= id < count: at once on CPU, by a device-side assertion elsewhere and while tracing."""
    if torch.compiler.is_compiling():
        most = "count - 1" if is_dynamo_compiling() else count - 1  # a number would be compiled in
        torch._assert_async(((ids >= 0) & (ids < count)).all(), f"flexnorm: ids must be from 0 to {most}")
    if not readable(ids) or ids.numel() == 0:
        return
    good = (ids >= 0) & (ids < count)
    if ids.device.type != "cpu":
        torch._assert_async(good.all(), f"flexnorm: ids must be from 0 to {count - 1}")
    elif not good.all():
        guilty = ids[~good]
        raise ShapeError(
            say(
                f"ids are from 0 to count - 1 = {count - 1}",
                received=f"{guilty.numel()} of {ids.numel()} outside, the first is {int(guilty[0])}",
                instead=f"count={int(ids.max()) + 1}" if int(ids.min()) >= 0 else "number the groups from 0",
            )
        )
