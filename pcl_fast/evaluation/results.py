"""What an evaluation leaves: a table on the terminal, a JSON file and a picture."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from pcl_fast.evaluation.tasks.base import Outcome, Row, Task
from pcl_fast.files import write_whole
from pcl_fast.pretrained import Pretrained


def as_table(outcome: Outcome, title: str) -> Table:
    """Return the scores above the paper's."""
    table = Table("", *outcome.columns, title=title)
    for row in outcome.rows:
        table.add_row(row.name, *_shown(row, outcome.digits))
    table.add_section()
    for row in outcome.paper:
        table.add_row(f"paper: {row.name}", *_shown(row, outcome.digits))
    return table


def _shown(row: Row, digits: int) -> list[str]:
    return ["-" if score is None else f"{score:.{digits}f}" for score in row.scores]


def write_results(
    folder: Path, task: Task, pretrained: Pretrained, outcome: Outcome, *, ranks: int, device: str, seconds: float
) -> tuple[Path, Path]:
    """Write folder/TASK.json and folder/TASK.png; return their paths.

    Raises:
        OSError: one of them cannot be written.
    """
    content = {
        "task": task.name,
        "protocol": list(outcome.protocol),
        "settings": task.settings(),
        "checkpoint": {
            "path": str(pretrained.path),
            "sha256": pretrained.checksum,
            "source": pretrained.source,
            "encoder": pretrained.encoder,
            "architecture": pretrained.arch,
            **pretrained.facts,
        },
        "scores": [_as_dict(row, outcome) for row in outcome.rows],
        "paper": [_as_dict(row, outcome) for row in outcome.paper],
        "details": outcome.details,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "device": device,
        "ranks": ranks,
        "seconds": round(seconds, 1),
    }
    return _write_json(folder / f"{task.name}.json", content), _write_picture(folder / f"{task.name}.png", outcome)


def _as_dict(row: Row, outcome: Outcome) -> dict[str, Any]:
    return {"name": row.name, **dict(zip(outcome.columns, row.scores, strict=True))}


def _write_json(path: Path, content: dict[str, Any]) -> Path:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return path


def _write_picture(path: Path, outcome: Outcome) -> Path:
    figure = Figure(figsize=(9, 5), layout="constrained")
    outcome.draw(figure)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path
