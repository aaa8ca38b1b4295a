"""The golden files: what must stay as it is, as text. `python tests/golden/make.py` writes all of them anew.

A file is a row of sections. The first line of a section is its name, the lines below it are indented. A file whose name
ends with `_extras` needs torch-geometric, torchaudio and scikit-learn, and stays as it is without them.
"""

import ast
import importlib
import inspect
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any, ForwardRef

import torch
from torch import nn

HERE = pathlib.Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]  # a script is started with its own folder alone

import flexnorm  # noqa: E402

COMMAND = "python tests/golden/make.py"
EXTRAS = all(find_spec(name) is not None for name in ("torch_geometric", "torchaudio", "sklearn"))

Sections = Mapping[str, Iterable[str]]


# --- state -----------------------------------------------------------------------------------------------------------


def state(layers: Mapping[str, Callable[[], nn.Module]]) -> Sections:
    """Every key of a state dict with shape, dtype and, where it is one, "parameter"."""
    found: dict[str, list[str]] = {}
    for name, build in layers.items():
        layer = build()
        parameters = dict(layer.named_parameters())
        assert set(parameters) <= set(layer.state_dict())
        found[name] = [
            " ".join([key, shaped(value), *(["parameter"] if key in parameters else [])])
            for key, value in sorted(layer.state_dict().items())
        ] or ["no state"]
    return found


def shaped(t: torch.Tensor) -> str:
    """Shape and dtype of a tensor."""
    return f"[{', '.join(map(str, t.shape))}] {str(t.dtype).removeprefix('torch.')}"


def layers() -> Sections:
    """The state of the layers that need no extra."""
    from layer_cases import LAYERS

    return state(LAYERS)


def layers_extras() -> Sections:
    """The state of the layers of graphs."""
    from layer_cases import layers_of_graphs

    return state(layers_of_graphs())


# --- signatures ------------------------------------------------------------------------------------------------------

# The import paths that the documentation has. A name that is in no `__all__` of its module stands here by itself.
MODULES: dict[str, tuple[str, ...]] = {
    "flexnorm": (),
    "flexnorm.conversion": ("SyncBatchNorm", "convert_sync_batchnorm"),
    "flexnorm.description": (),
    "flexnorm.drawing": ("draw",),
    "flexnorm.errors": ("ShapeError", "SpecError"),
    "flexnorm.functional": ("moments", "normalize"),
    "flexnorm.grouping": (),
    "flexnorm.images": (),
    "flexnorm.inspection": (),
    "flexnorm.mixtures": (),
    "flexnorm.norm": ("Norm", "calibrate"),
    "flexnorm.padding": (),
    "flexnorm.partition": ("Partition",),
    "flexnorm.presets": (),
    "flexnorm.recommendation": (),
    "flexnorm.sequences": (),
    "flexnorm.spec": ("Spec",),
    "flexnorm.spectrograms": (),
    "flexnorm.statistics": ("Moments",),
    "flexnorm.successors": (),
    "flexnorm.synchronized": (),
    "flexnorm.transition": (),
}
MODULES_OF_EXTRAS: dict[str, tuple[str, ...]] = {"flexnorm.graphs": ()}


def signatures() -> Sections:
    """The signatures of all public names."""
    return _signatures(MODULES)


def signatures_extras() -> Sections:
    """The signatures of all public names of the modules that need an extra."""
    return _signatures(MODULES_OF_EXTRAS)


def _signatures(modules: Mapping[str, tuple[str, ...]]) -> Sections:
    found: dict[str, list[str]] = {}
    seen: dict[int, str] = {}
    for path, more in modules.items():
        module = importlib.import_module(path)
        for name in sorted({*getattr(module, "__all__", ()), *more}):
            value = getattr(module, name)
            first = seen.setdefault(id(value), f"{path}.{name}")
            found[f"{path}.{name}"] = list(_described(value)) if first == f"{path}.{name}" else [f"is {first}"]
    return found


def _described(value: Any) -> Iterable[str]:
    """The signature of a function; of a class what it is, how it is built, and its public members."""
    if not inspect.isclass(value):
        yield signature(value)
        return
    bases = [base.__name__ for base in value.__mro__[1:-1] if not base.__name__.startswith("_")]
    if bases:
        yield f"is a {', '.join(bases)}"
    if "__init__" in vars(value) or "__new__" in vars(value) or not issubclass(value, Exception):
        yield f"{value.__name__}{signature(value)}"
    own = [base for base in value.__mro__ if base.__module__.split(".")[0] == "flexnorm"]
    names = {name for base in own for name in vars(base) if not name.startswith("_")}
    of_norm = flexnorm.Norm if value is not flexnorm.Norm and issubclass(value, flexnorm.Norm) else object
    for name in sorted(names):
        member, kind = inspect.getattr_static(value, name), getattr(value, name)
        if member is inspect.getattr_static(of_norm, name, None) or not _own(kind):
            continue  # the members of Norm stand there once, and those of torch are torch's
        if isinstance(member, property) or not callable(kind):
            settable = isinstance(member, property) and member.fset is not None
            yield f".{name}{' (settable)' if settable else ''}"
        else:
            yield f".{name}{signature(kind)}"


def _own(value: Any) -> bool:
    """Whether a member is no function that a class has from torch, whose signatures change with torch's versions."""
    return not inspect.isroutine(value) or value.__module__.split(".")[0] == "flexnorm"


class _Text:
    """An annotation, which prints as it was written."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _written(annotation: Any) -> Any:
    """The annotation as it stands in the source: each version of Python prints the other forms differently."""
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    return _Text(annotation) if isinstance(annotation, str) else annotation


def signature(f: Any) -> str:
    """`inspect.signature`, with one line for each parameter if one line is too short for all."""
    found = inspect.signature(f)
    parameters = [p.replace(annotation=_written(p.annotation)) for p in found.parameters.values()]
    found = found.replace(parameters=parameters, return_annotation=_written(found.return_annotation))
    if len(str(found)) <= WIDTH:
        return str(found)
    lines: list[str] = []
    last = inspect.Parameter.POSITIONAL_ONLY
    for p in parameters:
        if last is inspect.Parameter.POSITIONAL_ONLY is not p.kind and lines:
            lines.append("    /,")
        if p.kind is inspect.Parameter.KEYWORD_ONLY is not last and last is not inspect.Parameter.VAR_POSITIONAL:
            lines.append("    *,")
        lines.append(f"    {p},")
        last = p.kind
    back = str(found.replace(parameters=[])).removeprefix("()")
    return "\n".join(["(", *lines, f"){back}"])


WIDTH = 100


# --- errors ----------------------------------------------------------------------------------------------------------

PACKAGE = pathlib.Path(flexnorm.__file__).resolve().parent


def errors() -> Sections:
    """The outcome of every case that needs no extra."""
    from error_cases import CASES

    return {name: [outcome(call)] for name, call in CASES.items()}


def errors_extras() -> Sections:
    """The outcome of every case that needs an extra."""
    from error_cases import cases_of_extras

    return {name: [outcome(call)] for name, call in cases_of_extras().items()}


def outcome(call: Callable[[], Any]) -> str:
    """The exact type and the full text of the error; without one, what the result is.

    Type and text of an error that torch or Python raises are left out, because they change with their versions.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return f"ok: {told(call())}"
        except Exception as error:
            own = isinstance(error, (flexnorm.SpecError, flexnorm.ShapeError)) or raised(error) is not None
            text = re.sub(r"\bj\d+\b", "j1", str(error))  # torch counts the jagged tensors of a process
            text = text.replace("affine=True, bias=True", "affine=True")  # later versions of nn.GroupNorm say both
            return f"{type(error).__name__}\n{text}" if own else "an error of torch or Python"


def told(value: Any) -> str:
    """A result, in words that do not depend on its values."""
    if isinstance(value, torch.Tensor):
        shape = "jagged" if value.is_nested else shaped(value)
        return " ".join([shape, *([str(value.device)] if value.device.type != "cpu" else [])])
    if isinstance(value, flexnorm.Moments):
        return f"Moments {shaped(value.mean)}, count {shaped(value.count)}"
    if isinstance(value, tuple):
        return f"({'; '.join(map(told, value))})"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {told(part)}" for name, part in value.items())
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)


def raised(error: BaseException) -> tuple[str, int] | None:
    """File and line of the `raise` of flexnorm that this error comes from, if it comes from one."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    path = pathlib.Path(last.filename)
    if PACKAGE not in path.parents or not (last.line or "").startswith("raise"):
        return None
    return path.relative_to(PACKAGE).as_posix(), last.lineno or 0


CORE = (
    "arguments axes norm functional partition statistics context ranks graphs images sequences spectrograms presets "
    "mixtures spec synchronized grouping complexes"
)


def missed() -> None:
    """Prints the lines of the core that raise, and that no case and no test of `test_errors.py` reaches."""
    from error_cases import CASES, cases_of_extras
    from test_errors import CALLS, PATTERNS

    calls = [*CASES.values(), *(call for call, *_ in CALLS)]
    calls += [lambda p=p: flexnorm.normalize(torch.zeros(2, 2), p) for p, _ in PATTERNS]
    calls += list(cases_of_extras().values()) if EXTRAS else []
    reached = set()
    for call in calls:
        error: BaseException | None = None
        try:
            call()
        except Exception as caught:
            error = caught
        while error is not None:
            reached.add(raised(error))
            error = error.__context__
    for name in CORE.split():
        path = PACKAGE / f"{name}.py"
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and (f"{name}.py", node.lineno) not in reached:
                print(f"{path.name}:{node.lineno}: {ast.unparse(node)[:160]}")


# --- files -----------------------------------------------------------------------------------------------------------

FILES: dict[str, Callable[[], Sections]] = {
    "state.txt": layers,
    "state_extras.txt": layers_extras,
    "errors.txt": errors,
    "errors_extras.txt": errors_extras,
    "signatures.txt": signatures,
    "signatures_extras.txt": signatures_extras,
}


def text(sections: Sections) -> str:
    """The text of a golden file."""
    lines: list[str] = []
    for name, body in sorted(sections.items()):
        lines.append(name)
        lines += [f"  {line}".rstrip() for part in body for line in part.splitlines()]
    return "\n".join(lines) + "\n"


def main() -> None:
    for name, sections in FILES.items():
        if name.endswith("_extras.txt") and not EXTRAS:
            print(f"{name} stays as it is: an extra is missing")
            continue
        (HERE / name).write_text(text(sections()), encoding="utf-8")


if __name__ == "__main__":
    missed() if "--missed" in sys.argv else main()
