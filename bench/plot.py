"""Draws <folder>/loss.png from <folder>/loss.json: every provider's time by number of rows, and by negatives.

python bench/plot.py bench/results/<machine>/loss.json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

COLOURS = {
    "official": "tab:gray",
    "eager": "tab:blue",
    "compile": "tab:cyan",
    "compile+graph": "tab:green",
    "sdpa": "tab:orange",
    "triton": "tab:pink",
    "triton+graph": "tab:red",
}


def plot(path: Path) -> Path:
    """Draw the picture of a record, and return the picture's path."""
    record = json.loads(path.read_text())
    swept = [case for case in record["cases"].values() if "dtype" in case]
    dtype = Counter(case["dtype"] for case in swept).most_common(1)[0][0]
    swept = [case for case in swept if case["dtype"] == dtype]
    base_rows, base_negatives = (Counter(case[name] for case in swept).most_common(1)[0][0] for name in ("N", "r"))

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw(left, [case for case in swept if case["r"] == base_negatives], "N", "N")
    left.set(xlabel="rows N", title=f"r = {base_negatives}", ylabel="forward and backward, ms")
    draw(right, [case for case in swept if case["N"] == base_rows], "columns", "r")
    right.set(xlabel="negatives r per granularity", title=f"N = {base_rows}")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{record['machine']}, {dtype}")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    return picture


def draw(axes: Axes, cases: list[dict], x: str, label: str) -> None:
    """Draw a line per provider, and one for the floor, over case[x], with case[label] at the ticks."""
    cases = sorted(cases, key=lambda case: case[x])
    for provider, colour in COLOURS.items():
        points = [
            (case[x], case["providers"][provider]["median_ms"]) for case in cases if provider in case["providers"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=provider)
    if all(case["floor_ms"] for case in cases):
        floor = [case["floor_ms"] for case in cases]
        axes.plot([case[x] for case in cases], floor, "k--", linewidth=1, label="one read of\nevery bank")
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([case[x] for case in cases], [str(case[label]) for case in cases])
    axes.margins(x=0.08)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
