"""Data of the site as script files: a page that was opened from disk may not fetch, but it may load scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pcl_fast.exploring.knowledge import Granularity, Knowledge
from pcl_fast.exploring.sheets import PER_SHEET

# Images in a chunk about clusters, about; images at a cluster's border that are shown.
_MEMBERS, BORDERLINE = 4096, 24
_DIGITS = 4
# A script ends at </script>, and these two end a line of older JavaScript.
_ESCAPED = {ord("<"): "\\u003c", ord("\u2028"): "\\u2028", ord("\u2029"): "\\u2029"}


def write_chunk(folder: Path, name: str, content: Any) -> None:
    """Write folder/NAME.js, which hands its content, JSON, to the pages' `receive`."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPED)
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"receive({json.dumps(name)},{text});\n", encoding="utf-8")


def images(known: Knowledge) -> Iterator[tuple[str, Any]]:
    """Yield what pages show of the images of every sheet."""
    for number, begin in enumerate(range(0, len(known.paths), PER_SHEET)):
        part = slice(begin, begin + PER_SHEET)
        yield (
            f"images/{number}",
            {
                "paths": known.paths[part],
                "labels": None if known.labels is None else known.labels.of[part].tolist(),
                "clusters": [granularity.assignment[part].tolist() for granularity in known.granularities],
                "distances": [_rounded(granularity.distance[part]) for granularity in known.granularities],
                "near": known.neighbours.index[part].tolist(),
                "nearDistances": _rounded(known.neighbours.distance[part]),
            },
        )


def clusters(known: Knowledge) -> Iterator[tuple[str, Any]]:
    """Yield a table of all clusters for every granularity, and what pages show of its clusters, some at a time."""
    for place, granularity in enumerate(known.granularities):
        begins = _cut(granularity.sizes)
        yield f"clusters/{granularity.k}", _table(known, granularity, begins)
        beside = [known.granularities[other] for other in (place - 1, place + 1) if other in _places(known)]
        overlaps = [(other.k, granularity.overlaps(other)) for other in beside]
        for number, (begin, end) in enumerate(zip(begins, [*begins[1:], granularity.k], strict=True)):
            yield (
                f"members/{granularity.k}/{number}",
                [_cluster(granularity, cluster, overlaps) for cluster in range(begin, end)],
            )


def _places(known: Knowledge) -> range:
    return range(len(known.granularities))


def _cut(sizes: np.ndarray) -> list[int]:
    """Return the first cluster of every chunk."""
    begins, held = [0], 0
    for cluster, size in enumerate(sizes.tolist()):
        # An empty cluster's entry takes room as well.
        if held and held + size + 16 > _MEMBERS:
            begins.append(cluster)
            held = 0
        held += size + 16
    return begins


def _table(known: Knowledge, granularity: Granularity, begins: list[int]) -> dict[str, Any]:
    table = {
        "begins": begins,
        "size": granularity.sizes.tolist(),
        "concentration": _rounded(granularity.concentration),
        "label": None,
        "purity": None,
    }
    if known.labels is not None:
        label, purity = granularity.majority(known.labels)
        table |= {"label": label.tolist(), "purity": _rounded(purity)}
    return table


def _cluster(granularity: Granularity, cluster: int, overlaps: list[tuple[int, list[list[tuple[int, int]]]]]) -> Any:
    members = granularity.members(cluster)
    margin = granularity.margin[members]
    border = members[np.argsort(margin, kind="stable")][: min(BORDERLINE, len(members) // 2)]
    return {
        "images": members.tolist(),
        "border": border.tolist() if np.isfinite(margin).all() else [],
        "near": granularity.near.index[cluster].tolist(),
        "nearDistances": _rounded(granularity.near.distance[cluster]),
        "overlaps": {str(k): found[cluster] for k, found in overlaps},
    }


def _rounded(values: np.ndarray) -> list:
    return np.round(values.astype(np.float64), _DIGITS).tolist()
