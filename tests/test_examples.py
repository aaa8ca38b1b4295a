"""The examples run, and print what they promise; so do the README's blocks."""

import pathlib
import re
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


@pytest.mark.slow
@pytest.mark.extras
@pytest.mark.parametrize("name", EXAMPLES)
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


EXTRA_PAGES = {"docs/graphs.md", "docs/spectrograms.md", "docs/sequences.md", "docs/images.md"}
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
