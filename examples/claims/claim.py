"""What every script of this folder prints: a claim, what to expect if it is true, what was measured, whether it holds.

`python examples/claims/NAME.py` prints it as text, `--markdown` as a section of docs/claims.md.
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"


@dataclass(frozen=True)
class Claim:
    """A claim and its test.

    Args:
        title: a few words.
        says: the claim, as it is told.
        source: who says so: a paper, a document, or what is said everywhere.
        expected: what should be measured, if it is true, and why: with the formula where there is one.
        columns, rows: what was measured. The first column says of what.
        verdict: HOLDS, IN_PART or FAILS, decided by the numbers.
        because: what the numbers say, in a sentence or two.
    """

    title: str
    says: str
    source: str
    expected: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    verdict: str
    because: str

    def __str__(self) -> str:
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        table = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)) for r in (self.columns, *self.rows)]
        parts = [("claim", self.says), ("source", self.source), ("expected", self.expected)]
        said = [_wrapped(word, text) for word, text in parts]
        lines = [f"{'measured' if i == 0 else '':<12}{line}".rstrip() for i, line in enumerate(table)]
        return "\n".join([self.title, "", *said, *lines, _wrapped(self.verdict.upper(), self.because, 0)])

    def markdown(self, script: str) -> str:
        def row(cells: Sequence[str]) -> str:
            return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

        table = [row(self.columns), row(["---"] * len(self.columns)), *map(row, self.rows)]
        said = [f"**Claim.** {self.says} ({self.source})", f"**Expected.** {self.expected}", "\n".join(table)]
        verdict = f"**{self.verdict[0].upper()}{self.verdict[1:]}.** {self.because}"
        return "\n\n".join([f"## {self.title}", *said, verdict, f"`python examples/claims/{script}`"])


def _wrapped(word: str, text: str, width: int = 12) -> str:
    head = f"{word:<{width}}" if width else f"{word}: "
    return textwrap.fill(head + text, 110, subsequent_indent=" " * (width or 4))


def tell(claim: Claim) -> None:
    script = sys.argv[0].replace("\\", "/").rsplit("/", 1)[-1]
    print(claim.markdown(script) if "--markdown" in sys.argv[1:] else claim)
