"""The bars, drawn from the JSON. The panel is opaque, so it reads the same on light pages and on dark ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import report

PAPER, INK, QUIET, GRID = "#fbfaf7", "#22262b", "#6b7078", "#dcd9d1"
COLORS = {"forward": "#1f6f8b", "forward+backward": "#d98032"}


def draw(results: report.Results, path: Path) -> None:
    """Two panels, a pair of bars for every case, large, in a plain process."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["condition"] == "plain" and row["size"] == "large":
            cases.setdefault(row["case"], {})[row["mode"]] = row
    if not cases:
        raise SystemExit("no large rows of a plain process to draw")
    names = sorted(
        cases, key=lambda name: ["expression", "pyg", "native"].index(next(iter(cases[name].values()))["kind"])
    )
    settings = {
        "svg.hashsalt": "flexnorm",  # the same numbers give the same file
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": QUIET,
        "ytick.color": INK,
    }
    with plt.rc_context(settings):
        height = 1.5 + 0.36 * len(names)
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, height), sharey=True, gridspec_kw={"width_ratios": [3, 2]}, facecolor=PAPER
        )
        for k, (mode, color) in enumerate(COLORS.items()):
            rows = [(i, cases[name][mode]) for i, name in enumerate(names) if mode in cases[name]]
            at = [i + (k - 0.5) * 0.36 for i, _ in rows]
            ratios = [row["ratio"] for _, row in rows]
            medians = [r["median"] for r in ratios]
            whiskers = [
                [r["median"] - r["low"] for r in ratios],
                [r["high"] - r["median"] for r in ratios],
            ]
            left.barh(at, [m - 1 for m in medians], 0.34, left=1, color=color, label=mode.replace("+", " + "))
            left.errorbar(medians, at, xerr=whiskers, fmt="none", ecolor=INK, elinewidth=0.8)
            right.barh(at, [row["eta"] for _, row in rows], 0.34, color=color)
            for y, (_, row) in zip(at, rows, strict=True):
                ratio, mark = row["ratio"], " wrong!" if row["error"] > 1 else ""
                wins = ratio["median"] >= 1
                left.annotate(
                    f"{ratio['median']:.2g}{mark}" if ratio["median"] < 10 else f"{ratio['median']:.0f}{mark}",
                    (ratio["high"] if wins else ratio["low"], y),
                    xytext=(4 if wins else -4, 0),
                    textcoords="offset points",
                    ha="left" if wins else "right",
                    va="center",
                    fontsize=7,
                    color=QUIET,
                )
        every = [row["ratio"]["median"] for modes in cases.values() for row in modes.values()]
        left.set_xscale("log")
        left.set_xlim(min(0.7, 0.6 * min(every)), max(1.5, 1.5 * max(every)))
        left.xaxis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]))
        left.xaxis.set_minor_locator(NullLocator())
        left.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
        left.axvline(1, color=INK, linewidth=1)
        left.set_xlabel("speed over that of the best peer (right of 1: flexnorm is faster)")
        right.set_xlabel("eta: share of what the memory allows")
        right.set_xlim(0, max(1.0, *(row["eta"] for modes in cases.values() for row in modes.values())) * 1.02)
        right.axvline(1, color=INK, linewidth=1)
        left.set_yticks(range(len(names)), names)
        left.set_ylim(len(names) - 0.4, -0.6)
        for axes in (left, right):
            axes.set_facecolor(PAPER)
            axes.grid(axis="x", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
            for side in axes.spines.values():
                side.set_visible(False)
        figure.legend(*left.get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False)
        title = "flexnorm against the best of its peers"
        figure.text(0.01, 1 - 0.12 / height, title, fontsize=12, fontweight="bold", va="top")
        figure.text(0.01, 1 - 0.36 / height, report.setting(results), fontsize=8, color=QUIET, va="top")
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / height))
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, facecolor=PAPER, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
        plt.close(figure)
