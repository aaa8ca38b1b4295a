"""The claims: every script has its place on the page, runs, and comes to the verdict that the page gives."""

import ast
import importlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "claims"
PAGE = ROOT / "docs" / "claims.md"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("claim", "collect"))


def loaded(name):
    """A module of the folder, which is no package: its scripts import `claim` as their neighbour."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


claim, collect = loaded("claim"), loaded("collect")


def sections():
    """Of the page, by the script that they name at their end."""
    parts = re.split(r"^(?=## )", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {re.search(r"`python examples/claims/(\w+)\.py`\s*\Z", part)[1]: part for part in parts}


def made(**changes):
    said = {
        "title": "A title: of 1/2",
        "says": "It is said.",
        "source": "told of norms",
        "expected": "2.",
        "columns": ("what", "how much"),
        "rows": [("|x|", "2"), ("y", "3")],
        "verdict": claim.HOLDS,
        "because": "2 = 2.",
    }
    return claim.Claim(**{**said, **changes})


# --- a claim, as text and as a section ---


def test_a_section_escapes_what_would_end_a_cell():
    lines = made().markdown("x.py").splitlines()
    assert lines[0] == "## A title: of 1/2"
    assert r"| \|x\| | 2 |" in lines
    assert "| what | how much |" in lines and "| --- | --- |" in lines
    assert "**Claim.** It is said. (told of norms)" in lines
    assert "**Holds.** 2 = 2." in lines
    assert lines[-1] == "`python examples/claims/x.py`"


def test_a_table_is_whole():
    with pytest.raises(ValueError, match="zip"):
        str(made(rows=[("one cell",)]))


def test_text_and_section_say_the_same():
    text = str(made(verdict=claim.IN_PART))
    assert "|x|   2" in text
    assert text.splitlines()[-1] == "HOLDS IN PART: 2 = 2."
    assert collect.verdict(made(verdict=claim.IN_PART).markdown("x.py")) == claim.IN_PART


# --- the page ---


def test_every_script_has_its_place():
    collect.check_order()
    assert sorted(collect.ORDER) == SCRIPTS


@pytest.mark.parametrize("order", [[], [*SCRIPTS, "nothing"], [*SCRIPTS, SCRIPTS[0]]])
def test_a_script_without_a_place_is_an_error(order, monkeypatch):
    monkeypatch.setattr(collect, "ORDER", order)
    with pytest.raises(collect.ScriptError, match="ORDER"):
        collect.check_order()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise SystemExit(3)", "failed"),
        ("while True: pass", "more than"),
        ("print('## Title')", "whether the claim holds"),
        ("print('**Holds.** So.')", "title"),
    ],
)
def test_a_script_that_fails_is_heard(code, says, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "FOLDER", tmp_path)
    monkeypatch.setattr(collect, "SECONDS", 1)
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(collect.ScriptError, match=says):
        collect.section("bad")


def test_the_page_has_every_section_in_order():
    assert list(sections()) == collect.ORDER
    assert collect.page([part.strip() for part in sections().values()]) == PAGE.read_text(encoding="utf-8")


def test_the_head_counts_and_links():
    texts = [made(title=f"Title {v}", verdict=v).markdown("x.py") for v in (claim.HOLDS, claim.FAILS, claim.HOLDS)]
    page = collect.page(texts)
    assert "Of 3 claims 2 hold, 0 hold in part, 1 does not hold." in page
    assert "| [Title does not hold](#title-does-not-hold) | does not hold |" in page


def test_anchors_are_those_of_the_site():
    toc = pytest.importorskip(
        "markdown.extensions.toc", reason="it comes with the tools of the documentation: make docs"
    )
    for text in ["A title: of 1/2", "Saved, and peak, memory", "One - two", *map(collect.title, sections().values())]:
        assert collect.anchor(text) == toc.slugify(text, "-")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_chooses_its_verdict_by_numbers(name):
    """`verdict=` is no constant."""
    calls = [node for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())) if isinstance(node, ast.Call)]
    (told,) = [node for node in calls if getattr(node.func, "id", "") == "Claim"]
    (verdict,) = [keyword.value for keyword in told.keywords if keyword.arg == "verdict"]
    assert getattr(verdict, "id", "") not in ("HOLDS", "IN_PART", "FAILS")


# --- the scripts ---


@pytest.mark.long
@pytest.mark.extras
@pytest.mark.parametrize("name", collect.ORDER)
def test_a_script_comes_to_the_verdict_of_the_page(name):
    """Words only: numbers may differ between machines."""
    assert collect.verdict(collect.section(name)) == collect.verdict(sections()[name])
