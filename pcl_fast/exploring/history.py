"""What is known of how an encoder was trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcl_fast.exploring.charts import Bar, Curve, bars, curves
from pcl_fast.exploring.knowledge import as_text
from pcl_fast.pretrained import Pretrained
from pcl_fast.run.rows import FILE, read_rows


@dataclass(frozen=True)
class History:
    """How an encoder was trained.

    facts: (what, how) in words.
    curves: its figures over the epochs; seconds: of every phase. Empty where there is no record.
    """

    facts: list[tuple[str, str]]
    curves: list[Curve]
    seconds: list[Bar]


def history_of(pretrained: Pretrained) -> History:
    """Read what lies beside a checkpoint; much may be missing."""
    folder = pretrained.path.parent
    rows = read_rows(folder) if (folder / FILE).is_file() else []
    return History(_facts(pretrained, _config(folder)), curves(rows), bars(_seconds(rows)))


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "preset" in found else {}


def _facts(pretrained: Pretrained, config: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("checkpoint", as_text(str(pretrained.path))), ("what it is", pretrained.source)]
    if config:
        optim, data = config.get("optim", {}), config.get("data", {})
        facts += [
            ("method", str(config.get("method"))),
            ("trained on", as_text(str(data.get("root")))),
            ("epochs", f"{pretrained.facts.get('epoch', '?')} of {config.get('epochs')}"),
            ("batch", f"{optim.get('batch_size')} images a step"),
            ("image size", f"{data.get('size')} px"),
            ("learning rate", str(optim.get("lr"))),
        ]
    return [*facts, ("network", pretrained.arch), ("encoder", pretrained.encoder)]


def _seconds(rows: list[dict[str, Any]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        if row["kind"] in ("epoch", "finished"):
            for phase, seconds in row.get("seconds", {}).items():
                # It is a part of training.
                name = "of training, waiting for data" if phase == "waiting for data" else phase
                total[name] = total.get(name, 0.0) + seconds
    return dict(sorted(total.items(), key=lambda item: -item[1]))
