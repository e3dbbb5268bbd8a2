"""The plan as a picture: a bar for either way, phase on phase."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from pcl_fast.files import write_whole
from pcl_fast.planning.job import DATA, EXCHANGE, FEATURES, PHASES, Phase

# Okabe and Ito's palette, told apart by everyone, and two greys for what is small.
_COLOURS = ("#0072B2", "#D55E00", "#999999", "#F0E442", "#CC79A7", "#56B4E9", "#009E73", "#555555")
_LIGHT = (EXCHANGE, DATA, FEATURES)  # of these, where the label is to be dark
_LABELLED = 0.035  # of the longer bar: narrower pieces have no room for a label


def draw(bars: Mapping[str, Mapping[str, Phase]], title: str, path: Path) -> None:
    """Write a picture, a PNG if the path does not say otherwise: one bar of hours per entry of `bars`, whose phases are
    named as in job.PHASES.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no such format.
    """
    figure = Figure(figsize=(11, 1.5 + 1.1 * len(bars)), layout="constrained")
    axes = figure.subplots()
    ends = dict.fromkeys(bars, 0.0)
    longest = max(sum(phase.hours for phase in phases.values()) for phases in bars.values())
    for name, colour in zip(PHASES, _COLOURS, strict=True):
        hours = [phases[name].hours for phases in bars.values()]
        pieces = axes.barh(list(bars), hours, left=list(ends.values()), height=0.62, color=colour, label=name)
        labels = [f"{length:.1f}" if length > _LABELLED * longest else "" for length in hours]
        axes.bar_label(pieces, labels, label_type="center", color="black" if name in _LIGHT else "white")
        ends = {bar: end + length for (bar, end), length in zip(ends.items(), hours, strict=True)}
    for row, end in enumerate(ends.values()):
        axes.text(end + 0.01 * longest, row, f"{end:.1f} h", va="center", weight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * longest)
    axes.set_xlabel("hours")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:] or "png", dpi=130))
