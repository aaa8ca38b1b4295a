"""All cases: shapes of real models, by field."""

from ..case import Case
from . import graphs, images, sequences, spectrograms

CASES: list[Case] = [*images.CASES, *sequences.CASES, *graphs.CASES, *spectrograms.CASES]
by_name = {case.name: case for case in CASES}
