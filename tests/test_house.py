"""The house: who imports whom, what an import costs, what is public, and that it is described."""

import ast
import importlib.util
import inspect
import pathlib
import subprocess
import sys

import pytest

import flexnorm
from flexnorm.moved import MOVED

PACKAGE = pathlib.Path(flexnorm.__file__).parent
CORE = [
    "_version", "errors", "spec", "library", "pattern", "watching", "partition", "axes", "sets", "canonical",
    "collectives", "statistics", "moved",
]  # fmt: skip
WINGS = ["core", "kernels", "calls", "layers", "above"]
ROOMS = ["interface", "aten", "native", "cpu", "triton", "plan", "__init__"]


def imports(path):
    """The modules of the package that a file imports, as paths."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parent.relative_to(PACKAGE).parts[
                : len(path.parent.relative_to(PACKAGE).parts) - node.level + 1
            ]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield (*base, *name.split("."))


def wing(parts):
    """The wing of a file. The files above the layers have no folders of their own yet."""
    return parts[0] if parts[0] in WINGS else "core" if parts[0] in CORE else "above"


def imported():
    """Every file of the package, and the files that it imports."""
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    files.pop(("__init__",))  # the face of the package: it shows what users import
    return {parts: set(imports(path)) for parts, path in files.items()}


def test_imports_go_from_wing_to_wing_in_one_direction():
    for parts, targets in imported().items():
        for target in targets:
            if parts[0] == "kernels" and target[0] == "kernels" and len(parts) > 1 and len(target) > 1:
                own = target[:2] == parts[:2] and len(parts) > 2  # files of one backend
                assert own or ROOMS.index(target[1]) < ROOMS.index(parts[1]), f"{parts} imports {target}"
            else:
                assert WINGS.index(wing(target)) <= WINGS.index(wing(parts)), f"{parts} imports {target}"


def test_imports_make_no_circle():
    left = {
        parts: {target for target in targets if target[0] != "kernels"}
        for parts, targets in imported().items()
        if parts[0] != "kernels"
    }
    while left:
        free = [parts for parts, targets in left.items() if not targets & left.keys()]
        assert free, f"a circle of imports among {sorted(left)}"
        for parts in free:
            del left[parts]


def test_earlier_names_of_modules_still_import():
    for name, target in MOVED.items():
        assert importlib.import_module(name) is importlib.import_module(target)
        assert importlib.util.find_spec(target) is not None


def test_a_layer_overrides_no_private_method():
    """A layer is made by the methods that anybody may override."""

    def of(cls):
        names = (n for n in vars(cls) if n.startswith("_") and not n.startswith("__"))
        return {n for n in names if inspect.isfunction(vars(cls)[n])}

    own = set().union(*(of(cls) for cls in flexnorm.Norm.__mro__ if cls.__module__.startswith("flexnorm")))
    found = [PACKAGE / f"{name}.py" for name in ("images", "sequences", "mixtures", "presets", "grouping", "padding")]
    for path in found:
        importlib.import_module(f"flexnorm.{path.stem}")
    left = list(flexnorm.Norm.__subclasses__())
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        if cls.__module__.startswith("flexnorm."):
            assert not of(cls) & own, cls


def test_only_spec_reads_characters():
    for path in PACKAGE.rglob("*.py"):
        names = {
            alias.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for alias in n.names
        }
        assert "re" not in names or path.name == "spec.py"


def test_import_is_silent_and_loads_nothing_heavy():
    code = (
        "import sys, torch, einops; before = set(sys.modules); import flexnorm;"
        "heavy = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['flexnorm']"
    assert done.stderr == ""


ADAPTERS = ["images", "sequences", "padding", "graphs", "spectrograms", "grouping", "presets"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_holds_no_formula(name):
    """It turns a container into pattern, labels and mask: it computes no mean and no variance, and adds no eps."""
    path = PACKAGE / f"{name}.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in {"mean", "var", "std", "var_mean", "std_mean"}, ast.unparse(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            names = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node)}
            assert "eps" not in names, ast.unparse(node)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_core_does_not_load_an_adapter(name):
    code = f"import flexnorm, sys; assert 'flexnorm.{name}' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert set(flexnorm.__all__) == {
        "Moments", "Norm", "Partition", "ShapeError", "SpecError", "calibrate", "convert", "explain", "given",
        "moments", "normalize", "recommend",
    }  # fmt: skip
    public = {
        name for name, value in vars(flexnorm).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(flexnorm.__all__)


@pytest.mark.parametrize("name", flexnorm.__all__)
def test_public_names_are_described_with_an_example(name):
    value = getattr(flexnorm, name)
    assert value.__doc__
    if issubclass(value, Exception) if inspect.isclass(value) else False:
        return
    assert ">>>" in value.__doc__
    members = (
        [m for n, m in vars(value).items() if not n.startswith("_") and callable(m)] if inspect.isclass(value) else []
    )
    for member in members:
        assert inspect.getdoc(member), f"{name}.{member} has no description"


def test_reserved_names_are_all_options_and_all_options_are_reserved():
    from flexnorm.spec import RESERVED

    options = set()
    layer = flexnorm.Norm
    for f in (flexnorm.normalize, flexnorm.moments, flexnorm.explain, layer.__init__, layer.forward, layer.step):
        kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        options |= {name for name, p in inspect.signature(f).parameters.items() if p.kind in kinds}
    assert options | {"self", "input"} == RESERVED  # torch's name for x


def test_no_path_of_a_machine_in_the_package():
    for path in PACKAGE.rglob("*.py"):
        assert "/home/" not in path.read_text()


def test_legs_of_ci_leave_out_what_there_is(pytestconfig):
    """A name that no file or test has any more would leave out nothing, and say nothing."""
    (legs,) = (plugin.LEGS for plugin in pytestconfig.pluginmanager.get_plugins() if hasattr(plugin, "LEGS"))
    for name in {name for left_out in legs.values() for name in left_out}:
        file, _, test = name.partition("::")
        text = (pathlib.Path(__file__).parent / file).read_text()
        assert f"def {test}(" in text if test else text, name
