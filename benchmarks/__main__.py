"""`python -m benchmarks`: measure, print, write the JSON, draw the bars. docs/speed.md says how it is measured."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from . import chart, machine, processes, report, rows
from .cases import CASES
from .processes import Part, sized

CHART = report.ROOT / "docs" / "speed.svg"
README, DOCS = report.ROOT / "README.md", report.ROOT / "docs" / "speed.md"
PAGES = {README: report.short_table, DOCS: report.long_table}
PAGES_OF_CALLS = {README: partial(report.calls_table, short=True), DOCS: report.calls_table}

SECONDS = {"all": 27 * 60, "plain": 5 * 60, "quick": 170}
"""The time that a command may take. After it no process begins, and the results name what is missing."""

UNCOMPILED = (
    "group norm 8x64x28x28",
    "group norm 24x224x56x56",
    "layer norm 6x100x384",
    "layer norm 24x512x1024",
    "batch norm, running statistics 3000x64",
)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast flexnorm is.")
    parser.add_argument("--plain", action="store_true", help="a plain process against torch's operations, nothing else")
    parser.add_argument("--quick", action="store_true", help="a part of the cases, one process each, no torch.compile")
    parser.add_argument("--calls", action="store_true", help="what a call costs, instead of the cases; one thread")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--results", type=Path, help="the JSON to write, or to read with --draw and --table")
    parser.add_argument("--draw", action="store_true", help=f"draw {CHART.name} from the JSON, measure nothing")
    parser.add_argument("--table", action="store_true", help="write the tables of the JSON into README and docs")
    parser.add_argument("--list", action="store_true", help="names of the cases")
    args = parser.parse_args(given)
    args.name = "plain" if args.plain else "quick" if args.quick else "all"
    return args


def main() -> int:
    args = arguments()
    if args.calls:
        return _calls(args)
    if args.list:
        for case in CASES:
            print(f"{case.name:<56} {case.table:<7}{'short' if case.short else ''}".rstrip())
        return 0
    path = args.results or report.path_of(args.device, args.name, partial=args.only is not None)
    if args.draw or args.table:
        results = report.read(path)
        if args.table:
            for page, table in PAGES.items():
                report.include(page, table(results))
        if args.draw:
            chart.draw(results, CHART)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU")
    return measure(args, path)


def _calls(args: argparse.Namespace) -> int:
    from . import calls

    path = args.results or (report.RESULTS / "calls-quick.json" if args.quick else calls.PATH)
    if not args.table:
        return calls.measure(path, quick=args.quick)
    for page, table in PAGES_OF_CALLS.items():
        report.include(page, table(report.read(path)), "calls")
    return 0


def parts(name: str, device: str = "cpu", only: str = "") -> list[Part]:
    """What a command measures, the most important first. On a GPU there is one condition, and one process is enough."""
    chosen = [case for case in CASES if only.lower() in case.name.lower()]
    torchs = [case for case in chosen if case.table == "torch"]
    others = [case for case in chosen if case.table == "peers"]
    against_torch = [item for case in torchs for item in sized(case)]
    bare = [item for case in torchs if case.name in UNCOMPILED for item in sized(case)]
    if device != "cpu":
        against_peers = [item for case in others for item in sized(case)]
        return [Part("plain", [*against_torch, *against_peers], processes=1)]
    if name == "quick":
        short = [item for case in chosen if case.short for item in sized(case, ["usual"])]
        return [Part("plain", short, processes=1)]
    if name == "plain":
        return [Part("plain", against_torch), Part("uncompiled", bare)]
    usual = [item for case in chosen if case.short for item in sized(case, ["usual"])]
    large = [item for case in chosen if case.short for item in sized(case, ["large"])]
    rest = [item for case in others if not case.short for item in sized(case)]
    return [
        Part("plain", against_torch),
        Part("uncompiled", bare),
        Part("kept", large, processes=1),
        Part("one thread", usual, processes=1),
        Part("plain", [item for case in others if case.short for item in sized(case)]),
        *(Part("plain", rest[first : first + 15], processes=2) for first in range(0, len(rest), 15)),
    ]


def measure(args: argparse.Namespace, path: Path) -> int:
    began, quick = time.monotonic(), args.name == "quick"
    machine.plain()
    settings = rows.Settings(args.device)
    if args.name != "all":
        settings = replace(settings, compile=not quick, peak=False, gated=2**22)
    wanted = parts(args.name, args.device, args.only or "")
    if not any(part.items for part in wanted):
        raise SystemExit(f"no case contains {args.only!r}: --list shows them")
    results: report.Results = {
        "machine": machine.described(args.device),
        "versions": machine.versions(),
        "settings": {
            "device": args.device,
            "name": args.name,
            "threads": torch.get_num_threads(),
            "conditions": {
                part.condition: {
                    "said": processes.CONDITIONS[part.condition].said,
                    "environment": processes.CONDITIONS[part.condition].environment,
                    "threads": processes.CONDITIONS[part.condition].threads or torch.get_num_threads(),
                }
                for part in wanted
            },
        },
        "rows": [],
        "missing": ["torch.compile (left out by --quick)"] if quick else [],
    }
    print(report.setting(results))
    if results["machine"]["load"] > 0.5:
        print(f"the machine is busy (load {results['machine']['load']:.1f}): these times are those of others, too")
    for row in processes.measure(wanted, settings, began + SECONDS[args.name], results["missing"]):
        results["rows"].append(row)
        print(report.line(row), flush=True)
        report.write(path, results)  # what is known, should it end early
    results["settings"]["seconds"] = time.monotonic() - began
    status = report.finish(results, path)
    if args.name == "all" and not args.only:
        try:
            chart.draw(results, CHART)
        except ImportError:
            print("no chart: it needs matplotlib (the extra viz)")
    return status


if __name__ == "__main__":
    sys.exit(main())
