"""Pictures that several tasks draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import FigureBase

if TYPE_CHECKING:
    from pcl_fast.evaluation.tasks.base import Row


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return a name for every checkpoint or run's folder: as many of the last parts of its path as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    most = max(map(len, parts))
    lengths = (length for length in range(1, most) if len({part[-length:] for part in parts}) == len(parts))
    length = next(lengths, most)
    return [str(Path(*part[-length:])) for part in parts]


def bars(figure: FigureBase, *, columns: Sequence[str], rows: Sequence[Row], label: str) -> None:
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


def sweep(figure: FigureBase, points: Sequence[tuple[float | None, ...]], *, names: Sequence[str], label: str) -> None:
    """Draw how a score depends on one setting, with a line for every value of a second one.

    Args:
        points: (setting, score) or (setting, second setting, score); without a score a point is left out.
        names: of the one or two settings.
        label: the score's name.
    """
    axes = figure.subplots()
    values = sorted({point[0] for point in points})
    for line in sorted({point[1:-1] for point in points}):
        found = [(values.index(point[0]), point[-1]) for point in points if point[1:-1] == line]
        kept = sorted(place for place in found if place[1] is not None)
        text = ", ".join(f"{name} {value:g}" for name, value in zip(names[1:], line, strict=True))
        axes.plot([place for place, _ in kept], [score for _, score in kept], marker="o", label=text)
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set(xlabel=names[0], ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        axes.legend(frameon=False)
