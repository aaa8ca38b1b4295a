"""`python -m benchmarks`: measure, print, write the JSON, draw the bars. docs/speed.md says how it is measured."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import chart, machine, overhead, peak, report, rows
from .case import Case
from .memory import TUNABLES, clone_over_copy, give_back, keep_freed_memory, warm

CHART = report.ROOT / "docs" / "speed.svg"
PAGES = {report.ROOT / "README.md": report.short_table, report.ROOT / "docs" / "speed.md": report.long_table}
PAGES_OF_CALLS = {
    report.ROOT / "README.md": partial(report.calls_table, short=True),
    report.ROOT / "docs" / "speed.md": report.calls_table,
}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast flexnorm is.")
    parser.add_argument("--quick", action="store_true", help="a part of the cases, 5 rounds, without torch.compile")
    parser.add_argument("--calls", action="store_true", help="what a call costs, instead of the cases; one thread")
    parser.add_argument("--threads", default="all", help="1, 2, ... or all (default)")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--results", type=Path, help="the JSON to write, or to read with --draw and --table")
    parser.add_argument("--draw", action="store_true", help=f"draw {CHART.name} from the JSON, measure nothing")
    parser.add_argument("--table", action="store_true", help="write the tables of the JSON into README and docs")
    parser.add_argument("--chart", type=Path, default=CHART, help="where to draw (svg or png)")
    parser.add_argument("--seconds", type=int, help="the time it may take; 140 if quick, else 1620")
    parser.add_argument("--resume", action="store_true", help="go on where a run of these settings ended")
    parser.add_argument("--list", action="store_true", help="names of the cases")
    args = parser.parse_args(given)
    if args.threads != "all" and not (args.threads.isdigit() and int(args.threads) > 0):
        parser.error(f"--threads is a number or all, not {args.threads!r}")
    return args


def main() -> int:
    args = arguments()
    if args.calls:
        return _calls(args)
    if args.list:
        from .cases import CASES

        for case in CASES:
            print(f"{case.name:<60} {case.kind:<11}{'quick' if case.quick else ''}".rstrip())
        print(overhead.NAME)
        return 0
    threads = torch.get_num_threads() if args.threads == "all" else int(args.threads)
    path = args.results or report.path_of(args.device, threads, quick=args.quick, partial=args.only is not None)
    if args.draw or args.table:
        results = report.read(path)
        if args.table:
            for page, table in PAGES.items():
                report.include(page, table(results))
        if args.draw:
            chart.draw(results, args.chart)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU")
    keep_freed_memory()
    return measure(args, threads, path)


def _calls(args: argparse.Namespace) -> int:
    from . import calls

    path = args.results or (report.RESULTS / "calls-quick.json" if args.quick else calls.PATH)
    if not args.table:
        return calls.measure(path, quick=args.quick)
    for page, table in PAGES_OF_CALLS.items():
        report.include(page, table(report.read(path)), "calls")
    return 0


def measure(args: argparse.Namespace, threads: int, path: Path) -> int:
    from .cases import CASES

    began = time.monotonic()
    torch.set_num_threads(threads)
    if args.device == "cpu":
        memory = machine.described("cpu")["memory_gib"]
        warm(min(4 if args.quick else 8, memory // 3) << 30)
    cache = machine.cache_bytes(args.device)
    deadline = began + (args.seconds or (140 if args.quick else 27 * 60))
    cases_until = deadline if args.quick else deadline - 120  # the rest is for peak memory
    settings = rows.Settings(args.device, threads, args.quick, cache, cases_until)
    steady = clone_over_copy(cache) if args.device == "cpu" else None
    results: report.Results = {
        "machine": machine.described(args.device),
        "versions": machine.versions(),
        "settings": {
            "device": args.device,
            "threads": threads,
            "quick": args.quick,
            "rounds": settings.rounds,
            "compile": not args.quick,
            "glibc_tunables": TUNABLES if args.device == "cpu" and sys.platform == "linux" else None,
            "clone_over_copy": steady,
        },
        "rows": [],
        "overhead": [],
        "peak": {},
        "missing": [],
    }
    print(report.setting(results) + ("" if steady is None else f"; clone takes {steady:.2f} of copy_"))
    chosen = [c for c in CASES if (c.quick or not args.quick) and (args.only or "").lower() in c.name.lower()]
    if args.quick:  # what nobody else has comes first, should time run out
        chosen.sort(key=lambda c: ["expression", "pyg", "native"].index(c.kind))
    overheads = (args.only or "").lower() in overhead.NAME
    if args.resume:
        before = report.read(path)
        results["rows"], results["overhead"] = before["rows"], before["overhead"]
        results["missing"] += before["missing"]
        known = {row["case"] for row in before["rows"]}
        chosen, overheads = [c for c in chosen if c.name not in known], False
    if not chosen and not overheads and not args.resume:
        raise SystemExit(f"no case contains {args.only!r}: --list shows them" + (" (with --quick)" * args.quick))
    if overheads:
        results["overhead"] = overhead.measure(args.device, settings.rounds)
        print(*map(report.overhead_line, results["overhead"]), sep="\n")
    _cases(chosen, settings, results, path)
    if args.quick:
        results["missing"].append("torch.compile and peak memory (left out by --quick)")
    else:
        wanted = _of_peak(results)
        results["peak"], wrong = peak.measured(args.device, threads, wanted, max(1.0, deadline - time.monotonic()))
        results["missing"] += [wrong] if wrong else []
        results["missing"].append("torch.compile in cache (left out)")
    results["settings"]["seconds"] = time.monotonic() - began
    return _finish(args, results, path)


def _cases(chosen: list[Case], settings: rows.Settings, results: report.Results, path: Path) -> None:
    for case in chosen:
        for resident in (False, True):
            if time.monotonic() > settings.until:
                results["missing"].append(f"{case.name}{' (in cache)' * resident} (time is up)")
                continue
            for row in rows.measure(case, settings, resident=resident, note=results["missing"]):
                results["rows"].append(row)
                print(report.line(row), flush=True)
            gc.collect()
        torch._dynamo.reset()
        give_back()
        report.write(path, results)  # what is known, should a later case end the process


def _of_peak(results: report.Results) -> list[list[str]]:
    """Ours and the best peer of every case."""
    wanted = []
    for row in results["rows"]:
        if row["mode"] == "forward+backward" and not row["resident"]:
            wanted += [[row["case"], "flexnorm"], [row["case"], row["best"]]]
    return wanted


def _finish(args: argparse.Namespace, results: report.Results, path: Path) -> int:
    status = report.finish(results, path)
    for name, value in results["peak"].items():
        if value is not None:
            print(f"  peak {value:6.2f} times x  {name}")
    if results["rows"] and not args.quick and not args.only:
        _drawn(results, args.chart)
    return status


def _drawn(results: dict[str, Any], path: Path) -> None:
    try:
        chart.draw(results, path)
    except ImportError:
        print("no chart: it needs matplotlib (the extra viz)")


if __name__ == "__main__":
    sys.exit(main())
