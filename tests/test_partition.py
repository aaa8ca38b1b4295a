"""`Partition`: counts, order and offsets, validation, and how it travels."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from flexnorm import Partition, ShapeError, SpecError, normalize


def test_counts_order_and_offsets():
    p = Partition(torch.tensor([2, 0, 2, 5, 0]), count=7)
    assert p.counts.tolist() == [2, 0, 2, 0, 0, 1, 0]
    assert p.offsets.tolist() == [0, 2, 2, 4, 4, 4, 5, 5]
    assert p.order.tolist() == [1, 4, 0, 2, 3]
    assert not p.is_sorted
    assert p.counts is p.counts  # computed once
    assert Partition(torch.tensor([[0, 0], [1, 3]])).is_sorted


@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3), (2, 0, 3), ()])
def test_ids_of_any_shape(shape):
    ids = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0))
    p = Partition(ids)
    assert p.shape == ids.shape
    assert p.count == (int(ids.max()) + 1 if ids.numel() else 0)
    assert p.counts.sum() == ids.numel()
    assert torch.equal(ids.flatten()[p.order], ids.flatten().sort(stable=True).values)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype):
    assert Partition(torch.tensor([0, 2, 1], dtype=dtype)).ids.dtype == torch.int64


def test_from_sizes_and_offsets():
    expected = Partition(torch.tensor([0, 0, 2, 2, 2]), count=4)
    for made in (
        Partition.from_sizes([2, 0, 3, 0]),
        Partition.from_sizes(torch.tensor([2, 0, 3, 0], dtype=torch.int32)),
        Partition.from_sizes(size for size in [2, 0, 3, 0]),
        Partition.from_sizes(np.array([2, 0, 3, 0])),
        Partition.from_sizes([np.int64(2), 0, 3, 0]),
        Partition.from_offsets([0, 2, 2, 5, 5]),
        Partition.from_offsets(torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)),
    ):
        assert made == expected
        assert made.counts.tolist() == [2, 0, 3, 0]
    assert Partition.from_sizes([]) == Partition.from_offsets([0]) == Partition(torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: Partition([0, 1]), SpecError, "a plain list could mean ids or sizes"),
        (lambda: Partition(torch.tensor([0.0])), SpecError, "convert it with .long()"),
        (lambda: Partition(torch.tensor([True])), SpecError, "torch.bool"),
        (lambda: Partition(torch.tensor([0, -1])), ShapeError, "number the groups from 0"),
        (lambda: Partition(torch.tensor([0, 3]), count=3), ShapeError, "count=4"),
        (lambda: Partition(torch.tensor([0]), count=-1), SpecError, "count=-1"),
        (lambda: Partition(torch.tensor([0]), count=1.0), SpecError, "count=1.0"),
        (lambda: Partition(torch.tensor([0]), count=True), SpecError, "count=True"),
        (lambda: Partition.from_sizes([1, -2]), ShapeError, "[1, -2]"),
        (lambda: Partition.from_sizes([1.0]), SpecError, "whole numbers"),
        (lambda: Partition.from_sizes(torch.ones(2, 2, dtype=torch.long)), ShapeError, "(2, 2)"),
        (lambda: Partition.from_sizes(5), SpecError, "whole numbers"),
        (lambda: Partition.from_sizes([2**70]), SpecError, "whole numbers"),
        (lambda: Partition(torch.tensor([0]), count=2**70), SpecError, "whole number of 0 or more"),
        (lambda: Partition.from_offsets([1, 2]), ShapeError, "from_sizes"),
        (lambda: Partition.from_offsets([0, 3, 2]), ShapeError, "never fall"),
        (lambda: Partition.from_offsets([]), ShapeError, "begin with 0"),
    ],
)
def test_bad_input(make, kind, text):
    with pytest.raises(kind) as caught:
        make()
    assert text in str(caught.value)


def test_immutable_and_independent_of_the_tensor_it_was_made_from():
    ids = torch.tensor([0, 1])
    p = Partition(ids)
    ids[0] = 7
    assert p.ids.tolist() == [0, 1]
    with pytest.raises(AttributeError):
        p.count = 5
    with pytest.raises(TypeError):
        hash(p)


def test_equality():
    p = Partition(torch.tensor([0, 1]))
    assert p == Partition(torch.tensor([0, 1]))
    assert p != Partition(torch.tensor([0, 1]), count=3)
    assert p != Partition(torch.tensor([1, 0]))
    assert p != "graph"


def test_pickle_copy_and_moves():
    p = Partition(torch.tensor([0, 2, 1]), count=5)
    _ = p.order
    for q in (pickle.loads(pickle.dumps(p)), copy.deepcopy(p), copy.copy(p), p.to("cpu")):
        assert q == p
        assert torch.equal(q.order, p.order)
    assert p.to("cpu") is p
    assert p.to("meta").device.type == "meta"


def test_pytree():
    p = Partition(torch.tensor([0, 2, 1]), count=5)
    leaves, spec = pytree.tree_flatten({"graph": p})
    assert len(leaves) == 1
    assert leaves[0] is p.ids
    assert pytree.tree_unflatten(leaves, spec)["graph"] == p


def test_fake_tensors_are_not_looked_at():
    with FakeTensorMode():
        ids = torch.zeros(5, dtype=torch.long)
        y = normalize(torch.randn(5, 3), "v c, v -> graph[v] c", torch.rand(5), graph=Partition(ids, count=2))
    assert y.shape == (5, 3)


def test_through_data_loader_workers():
    def collate(items):
        return torch.randn(sum(items), 4), Partition.from_sizes(items)

    for x, graph in DataLoader([3, 1, 4, 1], batch_size=2, num_workers=1, collate_fn=collate):
        assert graph.count == 2
        assert normalize(x, "v c -> graph[v] c", graph=graph).shape == x.shape


def test_repr():
    assert repr(Partition(torch.zeros(2, 3, dtype=torch.long), count=4)) == "Partition(2x3 ids, count=4)"
    assert repr(Partition.from_sizes([2]).to("meta")) == "Partition(2 ids, count=1, device='meta')"
