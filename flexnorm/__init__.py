"""flexnorm: say in one line which elements share statistics.

y = normalize(x, "b t (g c), b t -> b g", mask, g=8)
"""

from ._version import __version__ as __version__
from .context import given
from .conversion import convert
from .errors import ShapeError, SpecError
from .functional import moments, normalize
from .inspection import explain
from .norm import Norm, calibrate
from .partition import Partition
from .recommendation import recommend
from .statistics import Moments

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
