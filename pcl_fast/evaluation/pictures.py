"""Pictures that several tasks draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pcl_fast.evaluation.tasks.base import Row


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return a name for every checkpoint or run's folder: as many of the last parts of its path as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    most = max(map(len, parts))
    lengths = (length for length in range(1, most) if len({part[-length:] for part in parts}) == len(parts))
    length = next(lengths, most)
    return [str(Path(*part[-length:])) for part in parts]


def bars(figure: Figure, *, columns: Sequence[str], rows: Sequence[Row], label: str) -> None:
    """Draw a group of bars for every column, with a bar for every row that has a score there."""
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        found = [(place + number * width, score) for place, score in enumerate(row.scores) if score is not None]
        if found:
            axes.bar(*zip(*found, strict=True), width=width, label=row.name)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(columns))], columns)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
