"""The benchmarks compute what they say: contenders agree with float64 on small data, and the arithmetic of the timing
is right on known numbers. Nothing here is timed."""

import gc
import importlib
import itertools
import json
import pathlib
import sys
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the installed package

names = ("calls", "case", "gate", "machine", "measure", "memory", "processes", "report", "rows")
calls, case, gate, machine, measure, memory, processes, report, rows = (
    importlib.import_module(f"benchmarks.{name}") for name in names
)
main = importlib.import_module("benchmarks.__main__")
CASES = importlib.import_module("benchmarks.cases").CASES
SCALE = 5e-4


@pytest.mark.parametrize("a_case", CASES, ids=[c.name for c in CASES])
def test_every_contender_computes_the_case(a_case):
    found = gate.errors(a_case, [a_case.contender, *a_case.peers], SCALE, "cpu")
    assert set(found) == {"flexnorm", *(peer.name for peer in a_case.peers)}
    for name, row in found.items():
        assert row["forward at 0"] <= 1 and (row["gradient at 0"] or 0) <= 1, f"{name}: {row}"
    for mode in rows.MODES:  # ours at mean 1000, too; what peers lose there is a result
        assert gate.worst(found["flexnorm"], mode) <= 1


def test_names_are_told_apart():
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names)
    for c in CASES:
        contenders = ["flexnorm", *(peer.name for peer in c.peers)]
        assert len(set(contenders)) == len(contenders), c.name
        assert sum(peer.formula for peer in c.peers) <= 1, c.name
    for table in ("torch", "peers"):
        of_table = [c for c in CASES if c.table == table]
        assert {c.kind for c in of_table if c.short} >= {c.kind for c in of_table} - {"pyg"} > set()
    assert any(c.short for c in CASES if c.kind == "pyg") == any(c.kind == "pyg" for c in CASES)


def a_case(name="layer norm 32x512x768"):
    return next(c for c in CASES if c.name == name)


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lambda d: a_case().ours(d) + 1e-4, "forward at 0"),
        (lambda d: a_case().ours(d).detach() + d.x * 0 + 0 * d.weight.sum() + 0 * d.bias.sum(), "gradient at 0"),
        (lambda d: a_case().ours(d) / d.weight.detach(), "forward at 0"),
        (lambda d: torch.full_like(d.x, torch.nan) * d.x * d.weight * d.bias, "forward at 0"),
    ],
    ids=["off by a little", "no gradient", "no weight", "nan"],
)
def test_the_gate_shuts(spoil, where):
    row = gate.errors(a_case(), [case.Contender("spoiled", spoil)], SCALE, "cpu")["spoiled"]
    assert row[where] > 1


def test_padding_is_no_affair_of_the_gate_and_what_is_valid_is():
    masked = a_case("masked tokens, group norm 32x512x768")
    left = case.Contender("left", lambda d: masked.ours(d) + (~d.mask).unsqueeze(2) * 7.0)
    lost = case.Contender("lost", lambda d: masked.ours(d) + d.mask.unsqueeze(2) * 7.0)
    found = gate.errors(masked, [left, lost], SCALE, "cpu")
    assert found["left"]["forward at 0"] <= 1 < found["lost"]["forward at 0"]


def test_float64_references_on_numbers_that_one_can_check():
    z, ratio = gate.pooled(torch.tensor([[1.0, 3.0]], dtype=torch.float64), (1,))
    assert torch.allclose(z, torch.tensor([[-1.0, 1.0]], dtype=torch.float64), atol=1e-4)
    assert ratio.item() == pytest.approx(2, rel=1e-4)
    x = torch.tensor([1.0, 3.0, 100.0], dtype=torch.float64)
    z, _ = gate.pooled(x, (0,), torch.tensor([1.0, 1.0, 0.0]))
    assert z.tolist() == pytest.approx([-1, 1, 98], rel=1e-4)
    z, ratio = gate.labelled(
        torch.tensor([[[1.0]], [[10.0]], [[3.0]], [[30.0]]]).double(), torch.tensor([0, 1, 0, 1]), 2
    )
    assert z.flatten().tolist() == pytest.approx([-1, -1, 1, 1], rel=1e-4)
    assert ratio.flatten().tolist() == pytest.approx([2, 2, 2, 2], rel=1e-4)


# --- pairs and intervals ---------------------------------------------------------------------------------------------


def samples(*seconds):
    return [measure.Sample(value, 0.0) for value in seconds]


def test_pairs_are_looked_at_within_a_round():
    ours = [1.0, 2.0, 4.0, 8.0, 16.0]  # a machine that slows down
    ratios = measure.paired(samples(*[3 * t for t in ours]), samples(*ours))
    assert measure.bootstrap(ratios) == measure.Ratio(3, 3, 3)


def test_bootstrap_covers_the_median_and_narrows_with_more_rounds():
    generator = torch.Generator().manual_seed(1)
    hits, widths = 0, {10: 0.0, 40: 0.0}
    for _ in range(100):
        for rounds in widths:
            got = measure.bootstrap((2 + torch.randn(rounds, generator=generator)).tolist(), resamples=400)
            assert got.low <= got.median <= got.high
            widths[rounds] += got.high - got.low
            hits += got.low <= 2 <= got.high
    assert 180 <= hits <= 200  # of 200 intervals, 95 in 100 or a few more: of a median they are wide
    assert widths[40] < 0.7 * widths[10]


def test_one_slow_round_moves_nothing():
    assert measure.bootstrap([2.0] * 9 + [90.0]).median == 2


def test_one_odd_process_moves_no_median_and_widens_the_interval():
    got = measure.bootstrap([1.0] * 10, [1.1] * 10, [9.0] * 10)
    assert got.median == 1.1 and got.low == 1 and got.high == 9


def test_a_palindrome_meets_a_drift_evenly(monkeypatch):
    clock, order = [0.0], []

    def sample(run, calls, device):
        clock[0] += 1.0  # each sample is slower than the one before
        order.append(run())
        return measure.Sample(clock[0], 4 * clock[0])

    monkeypatch.setattr(measure, "sample", sample)
    runs = {name: lambda name=name: name for name in "abc"}
    times = measure.palindrome(runs, dict.fromkeys(runs, 1), 2, "cpu")
    assert "".join(order) == "abccba" * 2
    assert times["a"] == times["b"] == times["c"] == [measure.Sample(3.5, 14.0), measure.Sample(9.5, 38.0)]


def test_orders_go_forth_and_back_and_no_name_is_always_first():
    drawn = list(itertools.islice(measure.orders("abc"), 600))
    assert all(there == back[::-1] for there, back in zip(drawn[::2], drawn[1::2], strict=True))
    assert all(sum(order[0] == name for order in drawn) > 150 for name in "abc")


def test_interleaved_runs_meet_every_input_once(monkeypatch):
    clock, seen = [0.0], {"a": [], "b": []}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(measure.time, "monotonic", lambda: clock[0])

    def call(name, i):
        def run():
            assert not gc.isenabled()
            seen[name].append(i)
            clock[0] += {"a": 1.0, "b": 3.0}[name] * (i + 1)

        return run

    runs = {name: [call(name, i) for i in range(50)] for name in seen}
    times = measure.interleaved(runs, 4)
    assert gc.isenabled()
    assert seen == {"a": list(range(50)), "b": list(range(50))}
    assert len(times["a"]) == 12  # the last two steps are no round
    assert [s.seconds for s in times["a"][:2]] == [2.5, 6.5]
    assert measure.paired(times["b"], times["a"]) == [3] * 12
    assert len(measure.interleaved(runs, 4, seconds=0)["a"]) == measure.ROUNDS
    assert len(measure.interleaved(runs, 2, seconds=0)["a"]) == measure.ROUNDS


def test_the_garbage_collector_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        measure.interleaved({"a": [lambda: 1 // 0]}, 1)
    assert gc.isenabled()


def test_new_pages_are_counted():
    size = 64 << 20  # beyond what any allocator keeps at hand
    pages = size / 2**10 / machine.described("cpu")["page_kib"]
    faults = measure.sample(lambda: torch.ones(size // 4), 2, "cpu").faults
    assert 0 < faults <= 1.1 * pages  # huge pages need fewer
    x = torch.ones(4)
    assert measure.sample(lambda: x.add_(1), 2, "cpu").faults < 10


@pytest.mark.parametrize("fresh", [False, True])
def test_the_floor_copies_and_leaves_x_alone(fresh):
    data = case.Data(x=torch.ones(3), dy=torch.full((3,), 2.0))
    assert measure.floor([data], "forward", fresh=fresh)().tolist() == [1, 1, 1]
    forward, backward, read = measure.floor([data], "forward+backward", fresh=fresh)()
    assert read == 3 and backward.tolist() == [2, 2, 2]
    assert (forward is backward) != fresh and data.x.tolist() == [1, 1, 1]


def test_buffers_take_turns():
    seen = []
    one = case.Contender("one", lambda d: seen.append(d.x) or d.x)
    run = measure.runner(one, [case.Data(x=1), case.Data(x=2), case.Data(x=3)], "forward")
    for _ in range(4):
        run()
    assert seen == [1, 2, 3, 1]


def test_who_is_measured_in_pairs():
    glance = {"slow": 3.0, "wrong": 1.0, "near": 1.1, "right": 1.2}
    errors = {"slow": 0.1, "wrong": 9.0, "near": 2.0, "right": 0.5}
    assert rows._near(glance, errors) == ["wrong", "near", "right"]
    assert rows._near(glance, {**errors, "near": 0.5}) == ["wrong", "near"]
    assert rows._near({**glance, "right": 5.0}, {**errors, "slow": 2.0}) == ["wrong", "near"]
    assert rows._near({"only": 1.0}, {"only": 2.0}) == ["only"]


# --- memory ----------------------------------------------------------------------------------------------------------


def test_saved_bytes_counts_a_storage_once_and_no_parameter():
    x = torch.randn(64, 64, requires_grad=True)
    weight, other = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    data = case.Data(x=x, weight=weight, bias=None)
    assert memory.saved_bytes(case.Contender("", lambda d: (d.x * d.x) * d.weight), data) == 2 * x.nbytes  # x, x^2
    assert memory.saved_bytes(case.Contender("", lambda d: d.x * other), data) == 2 * x.nbytes
    assert memory.saved_bytes(case.Contender("", lambda d: d.x + other), data) == 0


# --- reports ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    """Rows of a real measurement, of small data in a few rounds: two processes' worth, in this one."""
    settings = rows.Settings(compile=False, rounds=2, seconds=0.0)
    measured = []
    for name in ("layer norm 2x16x128", "packed documents, group norm 16384x1024"):
        found = rows.look(a_case(name), 16 << 10, settings)
        timings = [json.loads(json.dumps([*rows.timed(a_case(name), found["scale"], found["near"], settings)]))] * 2
        for mode, these in zip(rows.MODES, zip(*timings, strict=True), strict=True):
            row = processes.row(a_case(name), "plain", found, mode, these)
            assert (
                row["size"] == "tiny"
                and row["processes"] == 2
                and row["rounds"] == 2 * len(these[0]["samples"]["copy"])
            )
            measured.append({**row, "size": "large", "short": True})  # so that tables and bars take it
    return {
        "machine": {**machine.described("cpu"), "processor": "a <processor>"},
        "versions": {"torch": "2"},
        "settings": {
            "threads": 1,
            "device": "cpu",
            "conditions": {"plain": {"said": "A plain process", "threads": 1}, "kept": {"said": "Kept", "threads": 1}},
        },
        "rows": measured,
        "missing": ["something"],
    }  # fmt: skip


def test_rows_say_what_they_promise(results, tmp_path):
    report.write(tmp_path / "r.json", results)
    again = report.read(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == again
    assert [row["mode"] for row in again["rows"]] == list(rows.MODES) * 2
    for row in again["rows"]:
        assert row["error"] <= 1 and row["faults"] >= 0 and row["copy_s"] > 0
        assert row["eta"] == pytest.approx(row["valid"] * row["floor_s"] / row["seconds"], rel=0.8)
        assert len(row["seconds_of_processes"]) == 2
        best = report.peer(row)
        assert best["ratio"] == row["ratio"] and best["faults"] >= 0
        assert f"{row['faults']:.0f} faults" in report.line(row)
    assert report.failed(again["rows"]) == []
    worse = {**again["rows"][0], "error": 3.0}
    assert len(report.failed([worse])) == 1 and "WRONG" in report.line(worse)


def test_every_process_has_a_say():
    """The median over processes, for the ratio too, however many rounds each of them has."""

    def timing(ours, rounds):
        sides = {"copy": 1.0, "floor": 2.0, "flexnorm": ours, "control": ours, "torch layer_norm": 12.0}
        taken = {name: [[seconds, 10 * seconds]] * rounds for name, seconds in sides.items()}
        return {"mode": "forward", "threads": 2, "buffers": 1, "samples": taken}

    wrong = {"forward at 0": 0.5, "forward at 1000": 2.0}
    found = {
        "shape": [2], "bytes": 8, "valid": 0.5, "saved": {"flexnorm": 1.0}, "peak": 2.0,
        "errors": {"flexnorm": {"forward at 0": 0.5}, "torch layer_norm": wrong},
        "near": {"forward": ["torch layer_norm"]}, "glances": {"forward": {}},
    }  # fmt: skip
    row = processes.row(a_case(), "plain", found, "forward", [timing(4.0, 2), timing(6.0, 2), timing(1.0, 30)])
    assert row["seconds"] == 4 and row["faults"] == 40 and row["seconds_of_processes"] == [4, 6, 1]
    assert row["ratio"]["median"] == 3 and row["eta"] == 0.25 and row["rounds"] == 34
    assert report.peer(row)["error"] == 2 and report.peer(row)["saved"] is None


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_fresh_process_measures_under_its_condition():
    settings = rows.Settings(compile=False, peak=False, rounds=2, seconds=0.0)
    missing: list = []
    part = processes.Part("one thread", processes.sized(a_case("layer norm 2x16x128")), processes=1)
    measured = list(processes.measure([part], settings, time.monotonic() + 300, missing))
    assert missing == [] and [row["mode"] for row in measured] == list(rows.MODES)
    for row in measured:
        assert row["condition"] == "one thread" and row["threads"] == 1 and row["shape"] == [2, 16, 128]
        assert row["best"] == "torch layer_norm" and "one thread" in report.label(row)
    assert list(processes.measure([part], settings, time.monotonic() - 1, missing)) == []
    assert missing == ["layer norm 2x16x128 (look: time is up)"]


def test_what_a_command_measures():
    torchs = [c for c in CASES if c.table == "torch"]
    parts = main.parts("all")
    assert [part.condition for part in parts[:5]] == ["plain", "uncompiled", "kept", "one thread", "plain"]
    plain = [(c.name, limit) for part in parts if part.condition == "plain" for c, limit in part.items]
    assert len(plain) == len(set(plain)) == len(torchs) + 3 * (len(CASES) - len(torchs))
    assert {case.name for case, _ in parts[1].items} == set(main.UNCOMPILED)
    assert [part.condition for part in main.parts("plain")] == ["plain", "uncompiled"]
    assert main.parts("plain")[0].items == parts[0].items == [(c, None) for c in torchs]
    assert all(part.processes == 1 for part in main.parts("quick")) and len(main.parts("quick")[0].items) >= 15
    assert not any(part.items for part in main.parts("all", only="no such case"))


def test_cases_against_torch_have_their_sizes():
    names = ("layer norm 2x16x128", "layer norm 6x100x384", "group norm, silu 1x128x256x256")
    assert [case.size_of(a_case(name).draw().x.nbytes) for name in names] == ["tiny", "usual", "large"]
    assert [case.size_of(n) for n in case.SIZES.values()] == ["tiny", "usual", "large"]


def test_the_heap_is_asked_for_by_the_environment(monkeypatch):
    for name in machine.settled():
        monkeypatch.delenv(name)
    machine.plain()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with pytest.raises(SystemExit, match="MALLOC_ARENA_MAX"):
        machine.plain()


@pytest.mark.parametrize(
    ("low", "high", "said"), [(1.2, 1.4, "faster"), (1.05, 1.4, "same"), (0.5, 0.8, "slower"), (0.8, 0.95, "same")]
)
def test_a_win_clears_the_noise(low, high, said):
    row = {"ratio": {"low": low, "high": high}, "control": {"low": 0.9, "high": 1.1}}
    assert report.verdict(row) == said


@pytest.mark.parametrize("table", [report.short_table, report.long_table])
def test_tables_go_between_the_markers_and_nowhere_else(results, table, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    for _ in range(2):
        report.include(page, table(results))
        text = page.read_text()
        assert text.startswith("before\n<!-- bench -->\n") and text.endswith("\n<!-- /bench -->\nafter\n")
        assert "old" not in text and "packed documents" in text


@pytest.fixture(scope="module")
def results_of_calls():
    pytest.importorskip("torch_geometric")
    notes: list = []
    few = calls.Settings(steps=8, warm=1, alike=4, seconds=0.0, compile=False)
    rows = [{**row, "shown": calls.shown(row)} for row in calls.measured(few, notes)]
    assert notes == []
    return {
        "machine": {"processor": "a processor", "cache_mib": 8.0},
        "versions": {"torch": "2"},
        "settings": {"threads": 1, "device": "cpu", "date": "2000-01-01"},
        "rows": rows,
        "missing": ["something"],
    }


def test_rows_of_calls(results_of_calls, tmp_path):
    rows_of_calls = results_of_calls["rows"]
    names = [(row["case"], row["mode"], row["best"] == calls.ONE_SHAPE) for row in rows_of_calls]
    assert len(set(names)) == len(names) == 3 + 6 + 3 + 7 * 2 * 3
    assert sum(row["shown"] for row in rows_of_calls) == len(calls.SHOWN)
    assert report.failed(rows_of_calls) == []
    for row in rows_of_calls:
        assert row["rounds"] >= 2 and 0 < row["reach"] < row["must"]
        assert row["faults"] >= 0 and row["copy_microseconds"] > 0
        assert row["best"] in row["peers"] and row["cost"]["low"] <= row["cost"]["median"] <= row["cost"]["high"]
        assert f"must {row['must']}" in report.call_line(row)
    report.write(tmp_path / "calls.json", results_of_calls)
    assert report.calls_table(report.read(tmp_path / "calls.json")).count("\n| ") == 1 + len(names)
    page = tmp_path / "page.md"
    page.write_text("<!-- bench -->\nkept\n<!-- /bench -->\n<!-- calls -->\nold\n<!-- /calls -->\n")
    report.include(page, report.calls_table(results_of_calls, short=True), "calls")
    text = page.read_text()
    assert "kept" in text and "old" not in text and text.count("\n| ") == 1 + len(calls.SHOWN)


def test_streams_have_shapes_enough_and_none_twice():
    for stream in calls.STREAMS:
        assert len(set(stream.shapes)) == len(stream.shapes) >= calls.Settings().steps + calls.Settings().warm


@pytest.mark.parametrize(("median", "said"), [(0.9, "reached"), (1.2, "kept"), (1.4, "missed")])
def test_a_call_meets_its_targets(median, said):
    assert report.aim({"cost": {"median": median}, "must": 1.3, "reach": 1.0}) == said


def test_calls_are_those_of_a_plain_process(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit, match="OMP_NUM_THREADS"):
        calls.measure(tmp_path / "calls.json")


@pytest.mark.parametrize("text", ["nothing", "<!-- bench --> only", "<!-- /bench --><!-- bench -->"])
def test_a_page_without_markers_is_refused(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit, match="<!-- bench -->"):
        report.include(page, "table")
    assert page.read_text() == text


def test_the_chart_is_the_same_for_the_same_numbers(results, tmp_path):
    pytest.importorskip("matplotlib")
    chart = importlib.import_module("benchmarks.chart")
    for name in ("one.svg", "two.svg"):
        chart.draw(results, tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    assert "packed documents" in drawn


def test_arguments():
    assert [main.arguments(given).name for given in ([], ["--plain"], ["--quick"])] == list(main.SECONDS)
    with pytest.raises(SystemExit, match="run `python -m benchmarks` first"):
        report.read(pathlib.Path("absent.json"))
