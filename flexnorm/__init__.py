"""flexnorm: say in one line which elements share statistics.

y = normalize(x, "b t (g c), b t -> b g", mask, g=8)
"""

from ._version import __version__ as __version__
from .calls.functional import moments, normalize
from .calls.given import given
from .conversion import convert
from .errors import ShapeError, SpecError
from .inspection import explain
from .layers.norm import Norm
from .layers.running import calibrate
from .moved import install as _install
from .partition import Partition
from .recommendation import recommend
from .statistics import Moments

_install()

__all__ = [
    "Moments",
    "Norm",
    "Partition",
    "ShapeError",
    "SpecError",
    "calibrate",
    "convert",
    "explain",
    "given",
    "moments",
    "normalize",
    "recommend",
]


def __getattr__(name: str) -> object:
    """A module under its earlier name, as an attribute of the package."""
    from importlib import import_module

    from .moved import MOVED

    if f"{__name__}.{name}" in MOVED:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
