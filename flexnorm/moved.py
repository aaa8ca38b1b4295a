"""Modules under the names that they had before: documented imports and pickles keep working."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED: Mapping[str, str] = {
    "flexnorm.arguments": "flexnorm.calls.arguments",
    "flexnorm.call": "flexnorm.calls.call",
    "flexnorm.complexes": "flexnorm.calls.complexes",
    "flexnorm.context": "flexnorm.calls.given",
    "flexnorm.dtensors": "flexnorm.calls.dtensors",
    "flexnorm.functional": "flexnorm.calls.functional",
    "flexnorm.gradients": "flexnorm.calls.gradients",
    "flexnorm.norm": "flexnorm.layers.norm",
    "flexnorm.ops": "flexnorm.calls.operators",
    "flexnorm.ranks": "flexnorm.calls.ranks",
    "flexnorm.static_labels": "flexnorm.layers.static_labels",
}


class _Finder:
    """Finds a module of the table under its earlier name: `import flexnorm.norm` gives `flexnorm.layers.norm`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Loader()) if name in MOVED else None


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> None:
        """The usual module: `exec_module` puts the right one into its place."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = import_module(MOVED[name])


def install() -> None:
    """Makes the earlier names importable."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)
