"""Models and state dicts that were pickled at an earlier commit load, and compute what they did."""

import io
import pickle

import pytest
import torch
from golden.make_pickles import MODELS, close, path, results

from flexnorm import Moments, Partition

SUFFIXES = ["", pytest.param("_graphs", marks=pytest.mark.extras)]


@pytest.fixture(params=SUFFIXES)
def suffix(request):
    if request.param:
        pytest.importorskip("torch_geometric")
    return request.param


def load(kind, suffix):
    return torch.load(path(kind, suffix), weights_only=kind != "model")


def check(model, suffix):
    """Every layer gives what it gave, in evaluation and then in training."""
    told = load("calls", suffix)["layers"]
    assert set(told) == set(model)
    for name, expected in told.items():
        found = results(model[name], (expected["args"], expected["options"]))
        for part in ("evaluated", "trained", "dx"):
            other = "evaluated" if part == "trained" else part  # the result in training is there if it differs
            close(found.get(part, found[other]), expected.get(part, expected[other]), f"{name}, {part}")
        assert list(found["running"]) == list(expected["running"]), name
        for key, t in expected["running"].items():
            close(found["running"][key], t, f"{name}, {key}")


def test_a_pickled_model(suffix):
    check(load("model", suffix), suffix)


def test_a_pickled_model_is_pickled_again(suffix):
    file = io.BytesIO()
    torch.save(load("model", suffix), file)
    file.seek(0)
    check(torch.load(file, weights_only=False), suffix)


def test_a_pickled_state_dict(suffix):
    build, _ = MODELS[suffix]
    model = build()
    model.load_state_dict(load("state", suffix))
    check(model, suffix)


def test_a_pickled_model_has_the_keys_of_a_new_one(suffix):
    build, _ = MODELS[suffix]
    old, state = load("model", suffix).state_dict(), load("state", suffix)
    assert sorted(old) == sorted(state) == sorted(build().state_dict())
    for key, t in state.items():
        assert torch.equal(old[key], t), key


def test_pickled_values():
    """`Moments` and `Partition` are safe for `torch.load(weights_only=True)`."""
    told = load("calls", "")["values"]
    m, partition = told["moments"], told["partition"]
    assert type(m) is Moments
    assert type(partition) is Partition
    assert torch.equal(m.count, torch.full((6,), 4))
    close(m.mean, told["x"].mean(0), "mean")
    close(m.var, told["x"].var(0, correction=0), "var")
    assert partition.count == 5
    assert torch.equal(partition.counts, told["counts"])
    partition.check()


def test_the_name_in_a_pickle_of_a_partition():
    """A pickle has the name of the function that rebuilds a `Partition`: `flexnorm.partition._rebuilt`."""
    ids = b"ctorch\ntensor\n((lI0\naI0\naI1\natR"  # torch.tensor([0, 0, 1])
    assert pickle.loads(b"cflexnorm.partition\n_rebuilt\n(" + ids + b"I2\ntR.") == Partition.from_sizes([2, 1])
