"""Settings of all tests."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", print_blob=True, derandomize=True)  # CI repeats: a failure there is one here
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(1)  # tensors are small, and tests run side by side


@pytest.fixture(autouse=True)
def seed():
    """What a test draws without a generator of its own is the same each time."""
    torch.manual_seed(20_26)  # not that of cases.arguments, or a tangent would be x itself
