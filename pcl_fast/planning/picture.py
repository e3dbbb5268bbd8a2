"""The plan as a picture: two bars, phase on phase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from pcl_fast.planning.job import DATA, EXCHANGE, FEATURES, PHASES, Phase

# Okabe and Ito's palette, told apart by everyone, and two greys for what is small.
_COLOURS = dict(
    zip(PHASES, ("#0072B2", "#D55E00", "#999999", "#F0E442", "#CC79A7", "#56B4E9", "#009E73", "#555555"), strict=True)
)
_LIGHT = (EXCHANGE, DATA, FEATURES)  # of these, where the label is to be dark
_LABELLED = 0.035  # of the longer bar: narrower pieces have no room for a label


def draw(bars: dict[str, Sequence[Phase]], title: str, path: Path) -> None:
    """Write a PNG: one bar of hours per entry of `bars`.

    Raises:
        ValueError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 1.5 + 1.1 * len(bars)), layout="constrained")
    axes = figure.subplots()
    totals = [sum(phase.hours for phase in phases) for phases in bars.values()]
    longest = max(totals)
    for row, (phases, total) in enumerate(zip(bars.values(), totals, strict=True)):
        left = 0.0
        for phase in phases:
            label = phase.name if row == 0 else None
            axes.barh(row, phase.hours, left=left, height=0.62, color=_COLOURS[phase.name], label=label)
            if phase.hours > _LABELLED * longest:
                colour = "black" if phase.name in _LIGHT else "white"
                axes.text(left + phase.hours / 2, row, f"{phase.hours:.1f}", ha="center", va="center", color=colour)
            left += phase.hours
        axes.text(total + 0.01 * longest, row, f"{total:.1f} h", va="center", weight="bold")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * longest)
    axes.set_xlabel("hours")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written: {error}") from error
