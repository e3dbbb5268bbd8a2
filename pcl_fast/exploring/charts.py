"""Small charts, as shapes in a box of 100 by 40 that a template draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH, HEIGHT = 100.0, 40.0


@dataclass(frozen=True)
class Curve:
    """A figure over the epochs: its points as SVG has them, and its first, last, least and greatest value."""

    name: str
    points: str
    first: float
    last: float
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    """A bar: what it is of, how much, and which share of the longest."""

    name: str
    value: float
    share: float


def curves(rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """Return a curve for every figure that a run's rows have of its epochs and evaluations."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in _figures(row):
            series.setdefault(name, []).append((row["epoch"], value))
    return [_curve(name, points) for name, points in series.items() if len(points) > 1]


def _figures(row: dict[str, Any]) -> list[tuple[str, float]]:
    if row["kind"] == "epoch":
        found = [(name, value) for name, value in row.items() if name not in ("kind", "step", "epoch")]
    elif row["kind"] == "evaluation":
        found = [("kNN accuracy", row.get("knn")), *((f"AMI of {k}", value) for k, value in row.get("ami", {}).items())]
    else:
        return []
    # What is not finite has no place on a chart.
    return [
        (name.replace("_", " "), float(value))
        for name, value in found
        if isinstance(value, (int, float)) and np.isfinite(value)
    ]


def _curve(name: str, points: Sequence[tuple[float, float]]) -> Curve:
    at, values = np.array(points, float).T
    low, high = float(values.min()), float(values.max())
    x = (at - at.min()) / max(float(np.ptp(at)), 1e-12) * WIDTH
    y = HEIGHT - (values - low) / max(high - low, 1e-12) * HEIGHT
    drawn = " ".join(f"{left:.1f},{top:.1f}" for left, top in zip(x, y, strict=True))
    return Curve(name, drawn, float(values[0]), float(values[-1]), low, high)


def bars(values: dict[str, float]) -> list[Bar]:
    """Return a bar for every value."""
    most = max([*values.values(), 1e-12])
    return [Bar(name, value, value / most) for name, value in values.items()]


def histogram(values: np.ndarray, most: int = 12) -> list[Bar]:
    """Return bars of how many of the whole numbers are in ranges of equal width."""
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // most))
    counts = np.bincount((values - low) // width)
    begins = [low + width * place for place in range(len(counts))]
    names = [f"{begin}" if width == 1 else f"{begin} to {begin + width - 1}" for begin in begins]
    return bars(dict(zip(names, counts.tolist(), strict=True)))
