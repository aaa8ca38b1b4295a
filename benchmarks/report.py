"""Results as JSON, as lines while they come, and as tables for the README and the docs, always made from the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

Results = dict[str, Any]


def path_of(device: str, name: str, *, partial: bool = False) -> Path:
    """Quick and partial runs have files of their own, which git ignores: they do not stand for the whole."""
    return RESULTS / f"{device}{'' if name == 'all' else f'-{name}'}{'-partial' if partial else ''}.json"


def write(path: Path, results: Results) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(_rounded(results), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> Results:
    if not path.exists():
        raise SystemExit(f"{path} is not there: run `python -m benchmarks` first, or name another with --results")
    found: Results = json.loads(path.read_text())
    return found


def _rounded(value: Any) -> Any:
    """Five digits say all that is known. Infinity, an error that is no number, becomes the largest float."""
    if isinstance(value, float):
        return float(f"{min(max(value, -1e308), 1e308):.5g}")
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


# --- what a row says -------------------------------------------------------------------------------------------------


def verdict(row: dict[str, Any]) -> str:
    """A win or a loss has to clear both 1 and the noise of the control row."""
    ratio, control = row["ratio"], row["control"]
    if ratio["low"] > max(1.0, control["high"]):
        return "faster"
    return "slower" if ratio["high"] < min(1.0, control["low"]) else "same"


def peer(row: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    """The entry of a peer, the best one unless another is named."""
    found: dict[str, Any] = next(p for p in row["peers"] if p["name"] == (name or row["best"]))
    return found


def failed(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Rows of ours that are wrong. (Those of peers are shown, and stay.)"""
    return [f"{label(row)}, {row['mode']}: {row['error']:.3g} times the bound" for row in rows if row["error"] > 1]


def label(row: dict[str, Any]) -> str:
    """The case, and what its name does not say."""
    return ", ".join([row["case"], *([row["condition"]] if row.get("condition", "plain") != "plain" else [])])


def memory(nbytes: float) -> str:
    return f"{nbytes / 2**20:.2g} MiB" if nbytes >= 2**18 else f"{nbytes / 2**10:.0f} KiB"


def _error(value: float) -> str:
    return f"{value:.2g}" if value <= 1 else f"**{value:.2g}!**"


def line(row: dict[str, Any]) -> str:
    ratio, control, best = row["ratio"], row["control"], peer(row)
    text = (
        f"  {label(row):<52.52} {memory(row['bytes']):>8} {'fwd' if row['mode'] == 'forward' else 'f+b'}"
        f" {1e3 * row['seconds']:9.3f} ms {row['faults']:6.0f} faults ({best['faults']:.0f})"
        f"  copy {1e3 * row['copy_s']:7.3f} ms  eta {row['eta']:4.2f}"
        f"  x{ratio['median']:<5.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] {verdict(row):<6}"
        f" control [{control['low']:.2f}, {control['high']:.2f}]  {row['best']}"
    )
    if best["error"] > 1:
        text += f" (its error: {best['error']:.2g} bounds)"
    return text + (f"  WRONG: {row['error']:.3g} bounds" if row["error"] > 1 else "")


def call_line(row: dict[str, Any]) -> str:
    cost, control = row["cost"], row["control"]
    text = (
        f"  {row['case']:<56} {row['mode']:<17} {row['microseconds']:8.1f} us"
        f" {cost['median']:6.2f} [{cost['low']:.2f}, {cost['high']:.2f}]"
        f"  must {row['must']:<4} reach {row['reach']:<4} {aim(row):<7}"
        f" control [{control['low']:.2f}, {control['high']:.2f}]"
        f"  {row['best']} {row['best_microseconds']:.1f} us"
        f"  faults {row['faults']:.2g} ({row['best_faults']:.2g})  copy {row['copy_microseconds']:.1f} us"
    )
    return text + (f"  WRONG: {row['error']:.3g} bounds" if row["error"] > 1 else "")


def aim(row: dict[str, Any]) -> str:
    """Which target the median meets: the higher one, the lower one, or none."""
    median = row["cost"]["median"]
    return "reached" if median <= row["reach"] else "kept" if median <= row["must"] else "missed"


def finish(results: Results, path: Path) -> int:
    """Writes the results and prints what is missing or wrong. The exit status is 1 if a result of ours is wrong."""
    write(path, results)
    for text in results["missing"]:
        print(f"not measured: {text}")
    print(f"{results['settings']['seconds']:.0f} s, written to {path}")
    wrong = failed(results["rows"])
    for text in wrong:
        print(f"WRONG: {text}")
    return 1 if wrong else 0


# --- tables ----------------------------------------------------------------------------------------------------------


def setting(results: Results) -> str:
    """One sentence: what this is a result of."""
    m, v, s = results["machine"], results["versions"], results["settings"]
    threads = f"{s['threads']} thread{'s' if s['threads'] > 1 else ''} of " if s["device"] == "cpu" else ""
    libc = f", {m['allocator']}" if m.get("allocator") else ""
    quick = ", a quick run" if s.get("name") == "quick" else ""
    return f"{threads}{m['processor']} ({m['cache_mib']:g} MiB cache){libc}, torch {v['torch']}, float32{quick}"


TABLES = {
    "torch": (
        "Speed over torch's operation, or over a formula (compiled if that is faster) where torch has none",
        "the other side",
    ),
    "peers": ("Times as fast as the best peer", "best peer, forward + backward"),
}


def short_table(results: Results) -> str:
    """For the README: rows of a plain process, those that stand for the others."""
    tables = []
    for table, (said, other) in TABLES.items():
        cases: dict[tuple[str, int], dict[str, Any]] = {}
        for row in results["rows"]:
            if row["condition"] == "plain" and row["table"] == table and row["short"] and row["size"] != "tiny":
                cases.setdefault((row["case"], row["bytes"]), {})[row["mode"]] = row
        lines = [
            f"{said} (a plain process, {setting(results)}):",
            "",
            f"| case | size | forward | forward + backward | {other} | saved / input |",
            "|---|---|---|---|---|---|",
        ]
        for (name, nbytes), modes in cases.items():
            if len(modes) == 2:
                forward, both = modes["forward"], modes["forward+backward"]
                lines.append(
                    f"| {name} | {memory(nbytes)} | {_times(forward)} | {_times(both)} | {_best(both)} "
                    f"| {both['saved']:.2f} |"
                )
        tables += ["\n".join(lines)] if cases else []
    return "\n\n".join(tables)


def long_table(results: Results) -> str:
    """For the docs: everything that a row says, a table for every condition."""
    lines = [
        f"On {setting(results)}; {', '.join(results['machine']['caches'])}; "
        f"huge pages: {results['machine']['huge_pages']}.",
        "",
        "![Times as fast as the best peer, and share of what the memory allows](speed.svg)",
    ]
    for name, condition in results["settings"]["conditions"].items():
        for table, (said, other) in TABLES.items():
            rows = [row for row in results["rows"] if row["condition"] == name and row["table"] == table]
            if rows:
                threads = f"{condition['threads']} thread{'s' if condition['threads'] > 1 else ''}"
                lines += [
                    "",
                    f"**{condition['said']}, {threads}. {said}.**",
                    "",
                    f"| case | size | mode | ms | page faults | `copy_` ms | eta | times | control | {other} "
                    "| its page faults | error / bound | saved / x | peak / x |",
                    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
                    *map(_long, rows),
                ]
    return "\n".join([*lines, *_missing(results)])


def _long(row: dict[str, Any]) -> str:
    r, c = row["ratio"], row["control"]
    mode = row["mode"] if row["mode"] == "forward" else "both"
    return (
        f"| {row['case']} | {memory(row['bytes'])} | {mode} | {1e3 * row['seconds']:.3g} "
        f"| {row['faults']:.0f} | {1e3 * row['copy_s']:.3g} | {row['eta']:.2f} "
        f"| {_times(row)} [{r['low']:.2f}, {r['high']:.2f}] | [{c['low']:.2f}, {c['high']:.2f}] | {_best(row)} "
        f"| {peer(row)['faults']:.0f} | {_error(row['error'])} | {row['saved']:.2f} "
        f"| {'' if row['peak'] is None else format(row['peak'], '.2f')} |"
    )


def calls_table(results: Results, *, short: bool = False) -> str:
    """What a call costs. The docs have all rows, the README has the rows that are `shown`."""
    lines = [
        f"Time of flexnorm over the time of the other side ({setting(results)}, {results['settings']['date']}):",
        "",
        "| call | mode | us | times the other side | must | reach | the other side |"
        + " control | error / bound | page faults | its page faults | `copy_` us |" * (not short),
        "|---|---|---|---|---|---|---|" + "---|---|---|---|---|" * (not short),
    ]
    for row in results["rows"]:
        if row["shown"] or not short:
            cost, control = row["cost"], row["control"]
            interval = f" [{cost['low']:.2f}, {cost['high']:.2f}]"
            median = f"**{cost['median']:.2f}**" if aim(row) != "missed" else f"{cost['median']:.2f}"
            line = (
                f"| {row['case']} | {row['mode']} | {row['microseconds']:.1f} | {median}{interval} | {row['must']} "
                f"| {row['reach']} | {row['best']}, {row['best_microseconds']:.1f} us"
            )
            if row["best_error"] is not None and row["best_error"] > 1:
                line += f" (error {_error(row['best_error'])})"
            if not short:
                line += (
                    f" | [{control['low']:.2f}, {control['high']:.2f}] | {_error(row['error'])} | {row['faults']:.2g} "
                    f"| {row['best_faults']:.2g} | {row['copy_microseconds']:.1f}"
                )
            lines.append(f"{line} |")
    return "\n".join([*lines, *([] if short else _missing(results))])


def _times(row: dict[str, Any]) -> str:
    text = f"{row['ratio']['median']:.2f}"
    if row["error"] > 1:
        return f"wrong: {row['error']:.2g} bounds"
    return {"faster": f"**{text}**", "same": f"{text} (noise)", "slower": text}[verdict(row)]


def _best(row: dict[str, Any]) -> str:
    error = peer(row)["error"]
    return row["best"] + (f" (error {_error(error)})" if error > 1 else "")


def _missing(results: Results) -> list[str]:
    return ["", "Not measured: " + "; ".join(results["missing"]) + "."] if results["missing"] else []


def include(path: Path, text: str, name: str = "bench") -> None:
    """Puts the text between the markers of a page, in place of what is there."""
    page = path.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise SystemExit(
            f"{path}: a table goes between one line {begin} and one line {end} after it; they are not there"
        )
    before, after = page[: page.index(begin) + len(begin)], page[page.index(end) :]
    path.write_text(f"{before}\n{text}\n{after}")
