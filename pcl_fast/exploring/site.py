"""The pages: templates, data and thumbnails in one folder that opens from disk."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pcl_fast.errors import MissingPackageError
from pcl_fast.exploring import chunks
from pcl_fast.exploring.charts import histogram
from pcl_fast.exploring.findings import Finding, find
from pcl_fast.exploring.history import History
from pcl_fast.exploring.knowledge import Knowledge
from pcl_fast.exploring.progress import Bar
from pcl_fast.exploring.projection import Projection, project
from pcl_fast.exploring.sheets import ACROSS, PER_SHEET, tile_of, write_sheets

PAGES = {
    "index": "Overview",
    "clusters": "Clusters",
    "map": "Map",
    "findings": "Findings",
    "cluster": None,
    "image": None,
}
# Rows of a finding that its page shows; the CSV file has all.
_SHOWN = 300


@dataclass(frozen=True)
class Story:
    """What the site says of itself.

    title: of all pages.
    notes: sentences on what is shown: whether it is a sample, where the clusters come from.
    history: how the encoder was trained.
    sampled: whether the images are a sample.
    complete: whether they are all that were clustered.
    """

    title: str
    notes: list[str]
    history: History
    sampled: bool
    complete: bool


def templates() -> Any:
    """Return jinja2's environment of the pages, in which every text is escaped.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingPackageError(
            'pcl_fast.explore needs the package jinja2: pip install "pcl-fast[explore]"'
        ) from error
    return Environment(
        loader=PackageLoader("pcl_fast.exploring"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_site(folder: Path, known: Knowledge, story: Story, bar: Bar, *, on_map: int, threads: int) -> None:
    """Fill a folder that is there.

    Args:
        folder: empty but for what the site is known by.
        known: what it shows.
        story: what it says of it.
        bar: is told how far it is.
        on_map: images on the map, at most.
        threads: how many images are decoded at once.

    Raises:
        ImageError: an image cannot be decoded; names it.
        OSError: the folder cannot be written.
    """
    sheets = folder / "sheets"
    sheets.mkdir()
    tile = tile_of(known.images)
    with bar.phase("thumbnails", len(known.paths)) as progress:
        greys = write_sheets(known.images, sheets, tile, threads=threads, progress=progress)
    found = find(known, greys, complete=story.complete)
    with bar.phase("map", 1):
        projection = project(known, on_map)
    _write_data(folder / "data", known, tile, found, projection)
    _write_tables(folder / "findings", known, found)
    _write_pages(folder, known, story, found, projection)
    _copy_static(folder / "static")


def _write_data(data: Path, known: Knowledge, tile: int, found: list[Finding], projection: Projection) -> None:
    site = {
        "images": len(known.paths),
        "ks": [granularity.k for granularity in known.granularities],
        "labels": None if known.labels is None else known.labels.names,
        "perSheet": PER_SHEET,
        "across": ACROSS,
        "tile": tile,
    }
    chunks.write_chunk(data, "site", site)
    for name, content in (*chunks.images(known), *chunks.clusters(known)):
        chunks.write_chunk(data, name, content)
    chunks.write_chunk(data, "findings", {finding.name: _shown(finding) for finding in found})
    chunks.write_chunk(data, "map", _map(known, projection))


def _shown(finding: Finding) -> dict[str, Any]:
    return {"columns": finding.columns, "imageColumns": finding.images, "rows": finding.rows[:_SHOWN]}


def _map(known: Knowledge, projection: Projection) -> dict[str, Any]:
    labels = None if known.labels is None else known.labels.of[projection.images].tolist()
    return {
        "images": projection.images.tolist(),
        "at": projection.positions.tolist(),
        "labels": labels,
        "clusters": [granularity.assignment[projection.images].tolist() for granularity in known.granularities],
        "prototypes": [found.tolist() for found in projection.prototypes],
    }


def _write_tables(folder: Path, known: Knowledge, found: list[Finding]) -> None:
    folder.mkdir()
    for finding in found:
        # Excel takes a file for UTF-8 that begins with a byte order mark.
        with open(folder / f"{finding.name}.csv", "w", newline="", encoding="utf-8-sig") as file:
            rows = csv.writer(file)
            rows.writerow(finding.columns)
            for row in finding.rows:
                named = zip(finding.columns, row, strict=True)
                rows.writerow([known.paths[value] if name in finding.images else value for name, value in named])


def _write_pages(folder: Path, known: Knowledge, story: Story, found: list[Finding], projection: Projection) -> None:
    environment = templates()
    facts = {
        "story": story,
        "pages": {name: title for name, title in PAGES.items() if title},
        "known": known,
        "sizes": {granularity.k: histogram(granularity.sizes) for granularity in known.granularities},
        "found": found,
        "shown": _SHOWN,
        "projection": projection,
    }
    for page in PAGES:
        text = environment.get_template(f"{page}.html").render(page=page, **facts)
        (folder / f"{page}.html").write_text(text, encoding="utf-8")


def _copy_static(folder: Path) -> None:
    folder.mkdir()
    for file in resources.files("pcl_fast.exploring").joinpath("static").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
