"""All cases: shapes of real models, by field. The cases of the table "torch" come first."""

from ..case import Case
from . import graphs, images, sequences, spectrograms

CASES: list[Case] = sorted(
    [*images.CASES, *sequences.CASES, *graphs.CASES, *spectrograms.CASES], key=lambda case: case.table != "torch"
)
by_name = {case.name: case for case in CASES}
