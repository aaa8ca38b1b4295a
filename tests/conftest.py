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

# What a leg of .ci/run leaves out: files, or tests of a file, that would only repeat what `make test` has said there.
_EITHER_WAY = dict.fromkeys(
    ("test_benchmarks.py", "test_canonical.py", "test_claims.py", "test_drawing.py", "test_house.py", "test_spec.py"),
    "is text and arithmetic: there is neither a kernel in it nor anything of torch that changes",
)
_TRACED = "compares what torch makes of the composition, which it sees with the library and without"
_MODELS = "says which layers there are and should be; what they compute stands in other files"
_KERNELS = "the library is the same file on every torch, and gets nothing of it but memory and threads"
_PROCESSES = "is about where the library lies and who loads it, in processes of its own"
LEGS = {
    "without-library": {
        **_EITHER_WAY,
        "test_triton.py": "has kernels of its own",
        **dict.fromkeys(("test_compile.py", "test_export.py", "test_onnx.py"), _TRACED),
        **dict.fromkeys(
            ("test_conversion.py", "test_description.py", "test_recommendation.py", "test_grouping.py"), _MODELS
        ),
        **dict.fromkeys(("test_main.py", "test_examples.py"), "shows what other files test"),
    },
    "newest": {
        **_EITHER_WAY,
        **dict.fromkeys(
            (
                "test_cpu.py::test_layouts",
                "test_cpu.py::test_rows_and_columns",
                "test_cpu.py::test_runs",
                "test_cpu.py::test_groups_of_rows",
                "test_cpu.py::test_labels_over_several_axes",
                "test_cpu.py::test_large_ranges",
                "test_cpu.py::test_large_ranges_of_other_dtypes",
                "test_cpu.py::test_large_results_are_those_of_their_parts",
                "test_cpu.py::test_a_first_element_far_away_costs_no_digits",
                "test_cpu.py::test_nan_stays_in_its_set",
                "test_cpu.py::test_what_is_masked_changes_no_bit",
                "test_cpu.py::test_equal_values_give_exactly_zero",
            ),
            _KERNELS,
        ),
    },
    "sanitized": {
        "test_calls.py::test_nothing_grows_with_shapes": "the sanitizer keeps what is freed",
        **dict.fromkeys(
            (
                "test_cpu.py::test_threads_are_those_that_torch_is_told",
                "test_cpu.py::test_a_copy_runs_on_its_library",
                "test_cpu.py::test_left_out_by_the_environment",
                "test_cpu.py::test_a_missing_library",
                "test_cpu.py::test_a_library_that_is_none",
                "test_cpu.py::test_a_library_of_another_version",
            ),
            _PROCESSES,
        ),
    },
}


def pytest_addoption(parser):
    parser.addoption("--leg", choices=LEGS, help="a leg of .ci/run, which leaves out what it would only repeat")


def pytest_ignore_collect(collection_path, config):
    """Files that a leg leaves out are not even imported."""
    return collection_path.name in LEGS.get(config.getoption("--leg"), {}) or None


# CI repeats: a failure there is one here. The legs after the first one draw fewer examples.
settings.register_profile("ci", print_blob=True, derandomize=True)
settings.register_profile("again", settings.get_profile("ci"), max_examples=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(1)  # tensors are small, and tests run side by side


def pytest_collection_modifyitems(config, items):
    """What a leg leaves out goes. What takes long begins first, so that no process waits for another at the end."""
    left_out = LEGS.get(config.getoption("--leg"), {})
    gone = {item for item in items if f"{item.path.name}::{getattr(item, 'originalname', None)}" in left_out}
    if gone:
        config.hook.pytest_deselected(items=list(gone))
        items[:] = [item for item in items if item not in gone]

    def begins(item):
        slow = item.get_closest_marker("slow")
        return 1 if slow is None else -slow.kwargs.get("minutes", 0)

    items.sort(key=begins)


@pytest.fixture(autouse=True)
def seed():
    """What a test draws without a generator of its own is the same each time."""
    torch.manual_seed(20_26)  # not that of cases.arguments, or a tangent would be x itself


@pytest.fixture
def inductor(monkeypatch):
    """torch's compiler for AVX2, or for no vectors at all.

    It asks the C++ compiler about each of six vector units in turn, which takes longer than what is tested.
    """
    from torch._inductor import cpu_vec_isa

    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", [cpu_vec_isa.VecAVX2()])
