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


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.S)


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_code_blocks_run_and_print_what_they_say(page, capsys):
    """All blocks of a page in one namespace. A comment `# prints: ...` behind a line is what that line prints."""
    space = {}
    assert blocks(page) or page != "README.md"
    for block in blocks(page):
        exec(compile(block, page, "exec"), space)
        printed = capsys.readouterr().out.splitlines()
        promised = re.findall(r"# prints: (.*)", block)
        assert printed == promised
