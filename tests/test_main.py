"""The command line: each command as a process, and what it says by click's runner."""

import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from click.testing import CliRunner

import flexnorm
from flexnorm import explain
from flexnorm.__main__ import main

GROUP = ["n (g c) h w -> n g", "--shape", "8,64,32,32", "g=32"]


def run(*words):
    done = CliRunner().invoke(main, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def shell(*words):
    command = [sys.executable, "-W", "error", "-m", "flexnorm", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help"], "Exit codes: 0 fine, 2 bad input."),
        (["--version"], flexnorm.__version__),
        (["explain", *GROUP], "nn.GroupNorm(32, 64)"),
        (["compare", "n c -> n", "n c -> c", "--shape", "4,6"], "* known as"),
        (["bench", "n c -> n", "--shape", "4,6", "--seconds", "0.1"], "x clone"),
        (["demo"], "the same, bit by bit"),
        (["env"], f"torch            {torch.__version__.split('+')[0]}"),
    ],
)
def test_a_command_as_a_process(words, said):
    done = shell(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert said in done.stdout
    assert "\x1b" not in done.stdout  # no colours where there is no terminal


@pytest.mark.slow
def test_refusals_and_drawings_as_a_process(tmp_path):
    done = shell("explain", "n c h w -> n d", "--shape", "8,64,32,32")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("the right side names the axis 'd', which x does not have\n    n c h w -> n d\n")
    assert "Traceback" not in done.stderr
    pytest.importorskip("matplotlib")
    path = tmp_path / "group.svg"
    done = shell("draw", *GROUP, "-o", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
    assert ET.parse(path).getroot().tag.endswith("svg")


@pytest.mark.slow
def test_the_installed_command_is_the_module():
    from importlib.metadata import entry_points

    for point in entry_points(group="console_scripts", name="flexnorm"):  # none, until it is installed anew
        assert point.load() is main


@pytest.mark.parametrize(("package", "says"), [("click", "flexnorm[cli]"), ("matplotlib", "flexnorm[viz]")])
def test_what_is_not_installed_is_named_in_one_line(package, says, tmp_path):
    code = f"import sys; sys.modules[{package!r}] = None; from flexnorm.__main__ import main; main()"
    command = [sys.executable, "-c", code, "draw", "n c -> n", "--shape", "4,6", "-o", str(tmp_path / "x.svg")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_says_what_the_function_says():
    assert run("explain", *GROUP).output.strip() == str(explain("n (g c) h w -> n g", (8, 64, 32, 32), g=32))
    told = ["--affine", "(g c)", "--no-center", "--eps", "0.5", "--activation", "silu", "--dtype", "bfloat16"]
    options = {"affine": "(g c)", "center": False, "eps": 0.5, "activation": "silu", "dtype": torch.bfloat16}
    expected = str(explain("n (g c) h w -> n g", (8, 64, 32, 32), sizes={"(g c)": 64}, c=2, **options))
    assert run("explain", *GROUP[:-1], "(g c)=64", "c=2", *told).output.strip() == expected
    assert "offset" in run("explain", *GROUP, "--no-scale").output
    assert run("explain", "--shape", "", "--", "->").exit_code == 0
    assert run("explain", *GROUP[:1], "--shape", "8x64x32x32", "g=32").output == run("explain", *GROUP).output


def test_labels_are_sizes_of_groups():
    out = run("explain", "n c f t -> n c band[f]", "--shape", "8,1,9,100", "band=2,3,4").output
    assert "24 of 200 to 400 elements, median 300" in out
    out = run("explain", "n h w -> n part[h w]", "--shape", "2,3,4", "part=5,7").output
    assert "4 of 5 to 7 elements" in out
    out = run("explain", "v c -> v", "--shape", "5,4", "--affine", "type[v] c", "type=2,3").output
    assert "weight [2, 4], bias [2, 4]" in out


def test_lengths_are_a_mask():
    out = run("explain", "b t (g c), b t -> b g", "--shape", "3,10,64", "g=8", "--lengths", "10,7,3").output
    assert f"{(3 + 7) * 64} elements outside of the mask" in out


def test_bad_input_of_explain_ends_with_2_and_a_line():
    shape = ["--shape", "8,64,32,32"]
    for words, said in [
        (["n c h w"], 'a pattern has one "->"'),
        (["n c h w -> n d"], "names the axis 'd'"),
        (["n c h -> n"], "it names 3, and x has 4"),
        (["n (g c) h w -> n g", "g=7"], "not divisible by 7"),
        (["n (g c) h w -> n g", "g=x"], "a name has a value of whole numbers"),
        (["n (g c) h w -> n g", "g"], "a name has a value of whole numbers"),
        (["n (g c) h w -> n g", "g=2,2"], "an axis has one size"),
        (["n (g c) h w -> n g", "g=2", "g=2"], "'g' is given once"),
        (["n (g c) h w -> n g", "q=2"], "'q' is no axis and no composition"),
        (["n c h w -> n kind[c]"], "kind=2,3,4: the sizes of its groups"),
        (["n c h w -> n kind[c]", "kind=2,3"], "sizes that add up to 64"),
        (["n c h w -> n kind[c]", "kind=-2,66"], "sizes of groups are 0 or more"),
        (["n c h w -> n", "--no-center", "--no-scale"], "subtracts the mean, divides by sigma, or both"),
        (["n c h w -> n", "--activation", "tanh"], "activation is one of"),
        (["n c h w -> n", "--affine", "d"], "names the axis 'd'"),
        (["n c h w -> n", "--lengths", "3"], "lengths are those of a mask"),
        (["n c h w, n c -> n", "--lengths", "3"], "mask of shape (8, 64)"),
        (["n c h w, n c -> n", "--lengths", "1,2,3,4,5,6,7,65"], "lengths are those of a mask"),
    ]:
        done = run("explain", *words, *shape)
        assert (done.exit_code, done.stdout) == (2, ""), words
        assert said in done.stderr, words
        assert "instead:" in done.stderr
    for shape in ("8,x", "8;2", "a"):
        done = run("explain", "n c -> n", "--shape", shape)
        assert done.exit_code == 2
        assert "is no shape" in done.stderr
    assert run("explain", "n c -> n", "--shape", "8,-2").exit_code == 2
    assert run("explain", "n c -> n").exit_code == 2  # without a shape
    assert run("explain", "n c -> n", "--shape", "2,3", "--dtype", "int8").exit_code == 2


# --- compare, draw ---------------------------------------------------------------------------------------------------


def test_compare_marks_what_differs_and_nothing_else():
    words = ["compare", "n c h w -> n c", "n (g c) h w -> n g", "--shape", "8,64,32,32", "g=8"]
    lines = run(*words).output.splitlines()
    marked = {line[2:].split("  ")[0].strip() for line in lines if line.startswith("*")}
    a = dict(explain("n c h w -> n c", (8, 64, 32, 32)).facts())
    b = dict(explain("n (g c) h w -> n g", (8, 64, 32, 32), g=8).facts())
    assert marked == {word for word in a if a[word] != b[word]}
    assert {"sets", "known as"} <= marked
    assert "x" not in marked
    same = run("compare", "n c -> n", "a b -> a", "--shape", "4,6").output
    assert not any(line.startswith("* sets") for line in same.splitlines())
    masked = run("compare", "b t c -> b", "b t c, b t -> b", "--shape", "2,5,3", "--lengths", "5,2").output
    assert "* sets" in masked
    assert run("compare", *words[1:-1], "q=8").exit_code == 2
    assert run("compare", "b t c -> b", "b t c -> t", "--shape", "2,5,3", "--lengths", "5,2").exit_code == 2


def test_draw(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "norms.png"
    done = run("draw", "n c h w -> n c", "n (g c) h w -> n g", "g=2", "--shape", "4,8,5,5", "-o", str(path))
    assert done.exit_code == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    path = tmp_path / "masked.svg"
    words = ["b t c, b t -> b kind[t]", "--shape", "2,5,3", "--lengths", "5,2", "kind=2,3", "--title", "Kinds"]
    assert run("draw", *words, "-o", str(path)).exit_code == 0
    text = path.read_text()
    assert run("draw", *words[:3], "kind=2,3", "-o", str(path)).exit_code == 0  # a mask as an example
    assert path.read_text() != text


def test_bad_input_of_draw(tmp_path):
    pytest.importorskip("matplotlib")
    for words, said in [
        (["n c -> n", "--shape", "4,6", "-o", str(tmp_path / "none" / "x.svg")], "cannot be written"),
        (["n c -> n", "--shape", "4,6", "-o", str(tmp_path / "x.pdf")], ".svg or .png"),
        (["a b c d e f -> a", "--shape", "1,2,3,4,5,6", "-o", str(tmp_path / "x.svg")], "5 axes"),
        (["n c -> n", "--shape", f"{2**40},{2**40}", "-o", str(tmp_path / "x.svg")], "elements"),
        (["n c -> n", "--shape", "0,3", "-o", str(tmp_path / "x.svg")], "without elements"),
        (["g=2", "-o", str(tmp_path / "x.svg")], "there is a pattern to draw"),
        (["n c", "--shape", "4,6", "-o", str(tmp_path / "x.svg")], 'a pattern has one "->"'),
        (["n c -> n", "--shape", "4,6", "--lengths", "3", "-o", str(tmp_path / "x.svg")], "no mask"),
    ]:
        done = run("draw", *words)
        assert (done.exit_code, done.stdout) == (2, ""), words
        assert said in done.stderr, words
    assert run("draw", "n c -> n").exit_code == 2  # no output


# --- bench, demo, env ------------------------------------------------------------------------------------------------


def test_bench_compares_with_what_is_the_same():
    out = run("bench", "n (g c) h w -> n g", "--shape", "2,8,6,6", "g=4", "--seconds", "0.1").output
    assert "torch: nn.GroupNorm(4, 8), forward and backward" in out
    rows = [line for line in out.splitlines() if line.endswith("x clone")]
    assert len(rows) == 5
    assert all(float(row.split()[-5]) > 0 for row in rows)
    assert rows[0].split()[-3] == "1.00"
    words = ["n c t -> kind[c]", "--shape", "2,5,6", "kind=2,3", "--affine", "c", "--seconds", "0.1"]
    out = run("bench", *words).output
    assert "torch has no operation that is the same, with parameters" in out
    assert "forward and backward" in out


def test_bench_shows_progress_over_two_seconds_and_refuses_what_is_too_large():
    assert run("bench", "n c -> n", "--shape", "4,6", "--seconds", "0.1").stderr == ""
    assert "measuring" in run("bench", "n c -> n", "--shape", "4,6", "--seconds", "2.1").stderr
    done = run("bench", "n c -> n", "--shape", "10000000,1000000")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "fits in memory" in done.stderr


def test_demo_shows_that_padding_does_not_count():
    out = run("demo").output
    assert "NaN in all padding: the result is the same, bit by bit." in out
    far = float(out.split("differs by ")[1].split(" at most")[0])
    off = float(out.split("it would differ by ")[1].split(".\n")[0])
    # Values of about 1, 4 operations after a mean of 5: (|mean| / sigma + |y|) * 4 * 6e-8 < 3e-6
    assert far < 3e-6 < 0.1 < off


def test_env_tells_versions_and_kernels(monkeypatch):
    out = run("env").output
    for word in ("flexnorm", "python", "torch", "einops", "triton", "threads", "CPU capability", "kernel aten"):
        assert any(line.startswith(word) for line in out.splitlines()), word
    from flexnorm.kernels import cpu

    monkeypatch.setattr(cpu, "library", lambda: "left out here")
    assert "not available: left out here" in run("env").output


@pytest.mark.parametrize("command", ["explain", "draw", "compare", "bench", "demo", "env"])
def test_help_has_an_example_for_what_takes_arguments(command):
    out = run(command, "--help").output
    if command in ("explain", "draw", "compare", "bench"):
        assert f'flexnorm {command} "' in out
        assert "band=2,3,4" in out
    assert "Usage:" in out


def test_examples_of_the_help_run(tmp_path, monkeypatch):
    """Each line that begins with the command is one."""
    import shlex

    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for page in ([], *([name] for name in main.commands)):
        for line in run(*page, "--help").output.splitlines():
            if not line.strip().startswith("flexnorm "):
                continue
            words = shlex.split(line)[1:]
            words += ["--seconds", "0.1"] if words[0] == "bench" else []
            assert run(*words).exit_code == 0, line
            ran += 1
    assert ran >= 12
