"""The golden files say what must stay as it is: keys of state dicts, signatures, texts of errors."""

import difflib
import importlib.util
import inspect
import pathlib

import pytest
from golden import make
from layer_cases import LAYERS, layers_of_graphs
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent


def needs_extras(name):
    return pytest.param(name, marks=pytest.mark.extras if name.endswith("_extras.txt") else ())


@pytest.mark.parametrize("name", [needs_extras(name) for name in make.FILES])
def test_golden(name):
    if name.endswith("_extras.txt") and not make.EXTRAS:
        pytest.skip("an extra is missing")
    old, new = (make.HERE / name).read_text(encoding="utf-8"), make.text(make.FILES[name]())
    if old != new:
        lines = [text.splitlines(keepends=True) for text in (old, new)]
        diff = "".join(difflib.unified_diff(*lines, f"tests/golden/{name}", "the library", n=4))
        pytest.fail(
            f"{diff}\nIf this is meant: {make.COMMAND}, and the difference goes into the commit.", pytrace=False
        )


def reference():
    """The file that knows all public names."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_public_names_have_a_signature():
    names = {f"{module}.{name}" for module, name in reference().public()} - {"flexnorm.privacy.register"}  # of opacus
    files = [make.HERE / name for name in ("signatures.txt", "signatures_extras.txt")]
    lines = {line for file in files for line in file.read_text(encoding="utf-8").splitlines()}
    assert names <= lines


def public_layers(modules):
    values = [getattr(importlib.import_module(m), name) for m, name in reference().public() if m in modules]
    return {v for v in values if inspect.isclass(v) and issubclass(v, nn.Module)}


def test_all_public_layers_have_a_state():
    assert public_layers(make.MODULES) <= {type(build()) for build in LAYERS.values()}


@pytest.mark.extras
def test_all_public_layers_of_graphs_have_a_state():
    pytest.importorskip("torch_geometric")
    assert public_layers(make.MODULES_OF_EXTRAS) <= {type(build()) for build in layers_of_graphs().values()}
