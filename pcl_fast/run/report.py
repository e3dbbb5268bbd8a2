"""report.png: a run at a glance, drawn from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcl_fast.files import write_whole
from pcl_fast.methods import Metric
from pcl_fast.run.metrics import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]


def write_report(folder: Path, metrics: dict[str, Metric]) -> Path:
    """Draw folder/report.png; returns its path.

    Args:
        metrics: those of the run's method, which say by themselves where they are drawn.

    Raises:
        OSError: it cannot be written.
    """
    # Only where something is drawn: all ranks import this module, and at the start of a run.
    from matplotlib.figure import Figure

    rows: dict[str, Rows] = {kind: [] for kind in ("epoch", "clustering", "evaluation")}
    for row in read_rows(folder):
        rows.setdefault(row["kind"], []).append(row)
    titles = dict.fromkeys(metric.panel for metric in metrics.values())
    panels: list[tuple[str, Callable[[Axes, dict[str, Rows]], None]]] = [
        *((title, partial(_metrics, metrics=metrics, panel=title)) for title in titles),
        ("learning rate", _learning_rate),
        ("evaluated features", _evaluation),
        ("images per cluster, last clustering", _cluster_sizes),
        ("seconds per epoch", _seconds),
    ]
    across = 3
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5 * across, 4 * down), layout="constrained")
    grid = figure.subplots(down, across).flat
    for (title, draw), axes in zip(panels, grid, strict=False):
        draw(axes, rows)
        axes.set_title(title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid:  # those that are left
        axes.set_axis_off()
    # A path is no mathematics, though it may have $ and ^ in it.
    figure.suptitle(str(folder).encode(errors="replace").decode(), parse_math=False)
    path = folder / "report.png"
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path


def _lines(axes: Axes, rows: Rows, names: dict[str, str]) -> None:
    for name, label in names.items():
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set_xlabel("epochs")


def _metrics(axes: Axes, rows: dict[str, Rows], *, metrics: dict[str, Metric], panel: str) -> None:
    _lines(axes, rows["epoch"], {name: metric.label for name, metric in metrics.items() if metric.panel == panel})
    if panel.endswith("%"):
        axes.set_ylim(0, 100)


def _learning_rate(axes: Axes, rows: dict[str, Rows]) -> None:
    _lines(axes, rows["epoch"], {"lr": "learning rate"})
    axes.set_ylim(bottom=0)


def _evaluation(axes: Axes, rows: dict[str, Rows]) -> None:
    if not rows["evaluation"]:
        axes.text(0.5, 0.5, "no labels, no evaluation", ha="center", transform=axes.transAxes)
        return
    flat = [{**row, **{f"ami {k}": value for k, value in row["ami"].items()}} for row in rows["evaluation"]]
    # In the order in which the method names them.
    clusterings = dict.fromkeys(k for row in rows["evaluation"] for k in row["ami"])
    _lines(axes, flat, {"knn": "kNN accuracy", **{f"ami {k}": f"AMI({k})" for k in clusterings}})
    axes.set_ylim(0, 1)


def _cluster_sizes(axes: Axes, rows: dict[str, Rows]) -> None:
    from matplotlib.ticker import ScalarFormatter

    last = {row["k"]: row["size_deciles"] for row in rows["clustering"]}
    for k, deciles in sorted(last.items()):
        axes.plot(range(0, 101, 10), deciles, marker=".", label=f"{k} clusters")
    axes.set_xlabel("percentile")
    if last:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(ScalarFormatter())


def _seconds(axes: Axes, rows: dict[str, Rows]) -> None:
    others = {name for row in rows["epoch"] for name in row["seconds"]} - {"training", "waiting for data"}
    names = ["training", *sorted(others)]
    epochs = [row["epoch"] for row in rows["epoch"]]
    bottom = [0.0] * len(epochs)
    for name in names:
        seconds = [row["seconds"].get(name, 0.0) for row in rows["epoch"]]
        axes.bar(epochs, seconds, bottom=bottom, width=1.0, label=name)
        bottom = [below + value for below, value in zip(bottom, seconds, strict=True)]
    waiting = [row["seconds"].get("waiting for data", 0.0) for row in rows["epoch"]]
    axes.plot(epochs, waiting, color="black", lw=1, label="of training: waiting for data")
    axes.set_ylim(top=1.6 * max(bottom, default=1))  # room for the legend
    axes.set_xlabel("epochs")
