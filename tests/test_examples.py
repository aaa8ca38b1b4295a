"""The examples run, and print what they promise; so do the blocks of README and documentation, which is whole."""

import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.extras
def test_tour(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "tour.py")], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "within their bounds" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


EXAMPLES = [path.name for path in sorted((ROOT / "examples").glob("*.py")) if path.name != "tour.py"]
TRAIN = ["conversion.py", "graphs.py", "group_search.py", "images.py", "mixtures.py"]


@pytest.mark.slow
@pytest.mark.extras
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in TRAIN else n for n in EXAMPLES])
def test_example_runs_and_says_something(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.S)


FIELDS = ["graphs", "spectrograms", "sequences", "images", "grouping", "conversion"]
EXTRA_PAGES = {f"docs/{field}.md" for field in FIELDS}
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.extras if page in EXTRA_PAGES else ()) for page in PAGES]
)
def test_code_blocks_run_and_print_what_they_say(page, capsys):
    """All blocks of a page in one namespace. A comment `# prints: ...` behind a line is what that line prints."""
    space = {}
    assert blocks(page) or page != "README.md"
    for block in blocks(page):
        exec(compile(block, page, "exec"), space)
        printed = capsys.readouterr().out.splitlines()
        promised = re.findall(r"# prints: (.*)", block)
        assert printed == promised


# --- the documentation is whole --------------------------------------------------------------------------------------


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_shows_every_public_name():
    reference = script("reference")
    assert not reference.missing()
    modules = {f"flexnorm.{path.stem}" for path in (ROOT / "flexnorm").glob("*.py")} | {"flexnorm"}
    assert {identifier.rsplit(".", 1)[0] for identifier in reference.shown()} <= modules


def test_a_public_name_without_a_place_in_the_reference_is_found(tmp_path, monkeypatch):
    reference = script("reference")
    (tmp_path / "flexnorm").mkdir()
    (tmp_path / "docs" / "api").mkdir(parents=True)
    (tmp_path / "flexnorm" / "__init__.py").write_text('__all__ = ["Norm"]')
    (tmp_path / "flexnorm" / "images.py").write_text('__all__ = ["Norm", "forgotten"]')
    (tmp_path / "docs" / "api" / "all.md").write_text("::: flexnorm.Norm\n")
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    assert reference.missing() == ["flexnorm.images.forgotten"]


COMMANDS = re.findall(
    r"^flexnorm (.*)$",
    "\n".join(
        block
        for page in PAGES
        for block in re.findall(r"^```sh\n(.*?)```", (ROOT / page).read_text(), flags=re.S | re.M)
    ),
    flags=re.M,
)


@pytest.mark.extras  # matplotlib and click are extras, too
@pytest.mark.parametrize("line", dict.fromkeys(COMMANDS))
def test_command_lines_of_the_pages_run(line, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from flexnorm.__main__ import main

    words = shlex.split(line)
    if words[0] == "bench":
        words += ["--seconds", "0.1"]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert done.output.strip() or list(tmp_path.iterdir())


def test_pictures_are_of_the_patterns_beside_them():
    """A picture stands behind the code that it shows: each of its patterns is in the text of its section."""
    pictures, placed = script("pictures").PICTURES, []
    for page in ("index", "gallery", "inspection"):
        for section in re.split(r"^##+ ", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.M):
            for name in re.findall(r"\(pictures/(.*?)\.svg\)", section):
                placed.append(name)
                assert all(f'"{pattern}"' in section for pattern in pictures[name][0]), name
    assert set(placed) == set(pictures)


def test_formulas_and_examples_of_docstrings_become_code():
    pytest.importorskip("griffe", reason="it comes with the tools of the documentation: make docs")
    text = "Does it.\n\nFor each S:   y[S] = x[S]\n\nAttributes:\n    a, b: both.\n\n>>> f(1)\n2"
    expected = (
        "Does it.\n\nFor each S:\n\n```text\ny[S] = x[S]\n```\n\nAttributes:\n    a,\N{NO-BREAK SPACE}b: both."
        "\n\n```pycon\n>>> f(1)\n2\n```"
    )
    assert script("docstrings").as_markdown(text) == expected
