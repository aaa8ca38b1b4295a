"""Settings of all tests."""

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

# The leg on the newest torch has no extras: what imports them is not even collected there.
_NEEDS = {
    "test_graphs.py": "torch_geometric",
    "test_spectrograms.py": "torchaudio",
    "test_padding.py": "transformers",
    "test_opacus.py": "opacus",
    "test_privacy.py": "opacus",
    "test_onnx.py": "onnxruntime",
    "test_main.py": "click",
    "test_drawing.py": "matplotlib",
}
collect_ignore = [name for name, package in _NEEDS.items() if find_spec(package) is None]

settings.register_profile("ci", print_blob=True, derandomize=True)  # CI repeats: a failure there is one here
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(1)  # tensors are small, and tests run side by side


def pytest_collection_modifyitems(items):
    """What takes long begins first, so that no process waits for another at the end."""

    def begins(item):
        slow = item.get_closest_marker("slow")
        return 1 if slow is None else -slow.kwargs.get("minutes", 0)

    items.sort(key=begins)


@pytest.fixture(autouse=True)
def seed():
    """What a test draws without a generator of its own is the same each time."""
    torch.manual_seed(20_26)  # not that of cases.arguments, or a tangent would be x itself
