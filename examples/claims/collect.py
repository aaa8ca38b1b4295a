"""Runs every script of this folder and writes docs/claims.md: `make claims`."""

import os
import re
import signal
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from claim import FAILS, HOLDS, IN_PART

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent.parent / "docs" / "claims.md"
SECONDS, AT_ONCE = 60, 2

ORDER = [
    # what group norm is
    "special_cases",
    "batch_independence",
    "degrees_of_freedom",
    "invariance",
    "idempotence",
    # how nets train with it
    "small_batches",
    "variance_error",
    "gradient_variance",
    "residual_init",
    "channels_per_group",
    "memory",
    # other groups, other data
    "learned_groups",
    "padding",
    "band_gain",
    "voxel_weights",
    "robot_transfer",
    "fairness",
    "privacy",
]

HEAD = """# Claims, put to the test

Much is said of group norm. Here is what it comes to when measured. Each section is what one script of `examples/claims`
prints: the claim, what it leads one to expect, what was measured, and whether it holds. The criterion stands in the
script, with its reason, and the numbers decide. `make claims` runs them all and writes this page. Seeds are fixed; last
digits may differ between machines.
"""


class ScriptError(RuntimeError):
    """A script that failed, took too long, has no verdict, or has no place on the page."""


def check_order() -> None:
    there = {path.stem for path in FOLDER.glob("*.py")} - {"claim", "collect"}
    strays, missing = sorted(there - set(ORDER)), sorted(set(ORDER) - there)
    if strays or missing or len(ORDER) != len(set(ORDER)):
        raise ScriptError(f"ORDER names every script once. Not in it: {strays}; not in the folder: {missing}")


def section(name: str) -> str:
    """What the script prints, on one thread, so that its numbers repeat."""
    # seconds of CPU, so that a script may run beside others
    command = ["sh", "-c", f'ulimit -t {SECONDS}; exec "$@"', "sh"]
    command += [sys.executable, str(FOLDER / f"{name}.py"), "--markdown"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ScriptError(f"{name}.py takes more than {SECONDS} s")
    if done.returncode:
        raise ScriptError(f"{name}.py failed:\n{done.stderr}")
    title(done.stdout), verdict(done.stdout)
    return done.stdout.strip()


def title(text: str) -> str:
    found = re.search(r"^## (.*)$", text, flags=re.M)
    if found is None:
        raise ScriptError(f"a section begins with its title:\n{text}")
    return found[1]


def verdict(text: str) -> str:
    """HOLDS, IN_PART or FAILS, of a section."""
    for word in (HOLDS, IN_PART, FAILS):
        if re.search(rf"^\*\*{word}\.\*\*", text, flags=re.M | re.I):
            return word
    raise ScriptError(f"a section says whether the claim holds:\n{text}")


def anchor(text: str) -> str:
    """Of a heading, as Python-Markdown makes it."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def page(sections: list[str]) -> str:
    verdicts = [verdict(text) for text in sections]
    found = [(verdicts.count(word), word) for word in (HOLDS, IN_PART, FAILS)]
    plural = {HOLDS: "hold", IN_PART: "hold in part", FAILS: "do not hold"}
    counts = [f"{number} {word if number == 1 else plural[word]}" for number, word in found]
    rows = [
        f"| [{title(text)}](#{anchor(title(text))}) | {word} |" for text, word in zip(sections, verdicts, strict=True)
    ]
    count = f"Of {len(sections)} claims {', '.join(counts)}."
    return "\n".join([HEAD, count, "", "| claim | verdict |", "| --- | --- |", *rows, "", "\n\n".join(sections), ""])


def main() -> None:
    check_order()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sections = list(pool.map(section, ORDER))
    PAGE.write_text(page(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
