"""What somebody who looks after a data set wants to know first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pcl_fast.exploring.knowledge import Granularity, Knowledge

# Duplicates are among an image's nearest neighbours, and look the same: see `_difference`, at so many pixels a side.
GREY_SIDE, MOST_DIFFERENT = 16, 0.15
# Below so many grey values there is no contrast: what a JPEG file makes of a plain image.
_NOISE = 2.0
# Pairs that are compared at once.
_AT_ONCE = 20_000
# An outlier is far from its tenth neighbour. This share of all images is listed.
_AMONG, _OUTLIERS = 10, 0.01
# A cluster is pure if so much of it is of one label, and has more than a handful of images.
PURE, _HANDFUL = 0.9, 10
# An overlarge cluster has so many times the mean number of images.
OVERLARGE = 4.0


@dataclass(frozen=True)
class Finding:
    """A list of images or clusters.

    name: of the CSV file; title and explanation: for people.
    columns: names of what a row says.
    rows: a row is what its columns say; numbers of images and clusters are the site's.
    images: the columns that are numbers of images; the CSV has their paths instead.
    """

    name: str
    title: str
    explanation: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    images: tuple[str, ...] = ()


def find(known: Knowledge, greys: np.ndarray, *, complete: bool) -> list[Finding]:
    """Return all findings.

    Args:
        known: what is known of n images.
        greys: uint8 [n, GREY_SIDE, GREY_SIDE], see `grey`.
        complete: the images are all that were clustered; of others an empty cluster says nothing.
    """
    found = [_duplicates(known, greys), _outliers(known)]
    if known.labels is not None:
        found.append(_disagreements(known))
    if complete:
        found.append(_empty(known))
    return [*found, _overlarge(known)]


def grey(image: Image.Image) -> np.ndarray:
    """Return the few grey values of an image by which copies are told."""
    return np.asarray(image.convert("L").resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BOX))


def _duplicates(known: Knowledge, greys: np.ndarray) -> Finding:
    """Pairs of neighbours that look the same, the most alike first."""
    first = np.repeat(np.arange(len(greys)), known.neighbours.index.shape[1])
    second = known.neighbours.index.ravel()
    pairs = np.unique(np.sort(np.stack([first, second], 1), 1), axis=0)
    parts = np.array_split(pairs, max(1, len(pairs) // _AT_ONCE))
    different = np.concatenate([_difference(greys[part[:, 0]], greys[part[:, 1]]) for part in parts])
    alike = np.flatnonzero(different < MOST_DIFFERENT)
    alike = alike[np.argsort(different[alike], kind="stable")]
    rows = [(*pairs[place].tolist(), round(float(different[place]), 4)) for place in alike]
    return Finding(
        "near-duplicates",
        "Near-duplicates",
        f"Pairs of images that are near each other among the features and look the same at {GREY_SIDE} by {GREY_SIDE} "
        f"pixels: their grey values differ by less than {MOST_DIFFERENT:.0%} of their contrast (root mean squares).",
        ("image", "other", "difference"),
        rows,
        ("image", "other"),
    )


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return how far images look different, float32 [n], of grey values [n, side, side]: the root mean square of what
    they differ by, as a share of their standard deviation. Copies that were compressed again have some hundredths,
    images that have nothing to do with each other about sqrt(2).
    """
    a, b = a.astype(np.float32), b.astype(np.float32)
    contrast = np.sqrt((a.var((1, 2)) + b.var((1, 2))) / 2)
    return np.sqrt(np.square(a - b).mean((1, 2))) / (contrast + _NOISE)


def _outliers(known: Knowledge) -> Finding:
    distance = known.neighbours.distance[:, :_AMONG]
    count = min(len(distance), max(10, round(len(distance) * _OUTLIERS)))
    farthest = np.argsort(-distance[:, -1], kind="stable")[:count] if distance.shape[1] else []
    return Finding(
        "outliers",
        "Outliers",
        f"The {count} images that are farthest from their neighbours, by the distance of their features to those of "
        f"the {_AMONG}th nearest image: from 0, the same, to 2, the opposite.",
        ("image", "distance"),
        [(int(image), round(float(distance[image, -1]), 4)) for image in farthest],
        ("image",),
    )


def _disagreements(known: Knowledge) -> Finding:
    """An image comes once, in the purest cluster."""
    labels, found = known.labels, {}
    for granularity in known.granularities:
        majority, purity = granularity.majority(labels)
        pure = (purity >= PURE) & (granularity.sizes > _HANDFUL)
        theirs = granularity.assignment
        for image in np.flatnonzero(pure[theirs] & (labels.of != majority[theirs])).tolist():
            cluster = int(theirs[image])
            row = (round(float(purity[cluster]), 4), granularity.k, cluster, majority[cluster])
            found[image] = max(found.get(image, row), row)
    rows = [
        (image, labels.names[labels.of[image]], labels.names[label], k, cluster, purity)
        for image, (purity, k, cluster, label) in sorted(found.items(), key=lambda item: (-item[1][0], item[0]))
    ]
    return Finding(
        "label-disagreements",
        "Labels that disagree with a pure cluster",
        f"At least {PURE:.0%} of the cluster's images are of one label, and this one is of another: its label may be "
        "wrong, or the image unusual.",
        ("image", "label", "majority", "granularity", "cluster", "purity"),
        rows,
        ("image",),
    )


def _empty(known: Knowledge) -> Finding:
    rows = _clusters(known, lambda granularity: granularity.sizes == 0)
    explanation = "Prototypes that are nearest to no image."
    return Finding("empty-clusters", "Empty clusters", explanation, ("granularity", "cluster", "images"), rows)


def _overlarge(known: Knowledge) -> Finding:
    rows = _clusters(known, lambda granularity: granularity.sizes > OVERLARGE * granularity.sizes.mean())
    return Finding(
        "overlarge-clusters",
        "Overlarge clusters",
        f"Clusters of more than {OVERLARGE:g} times the mean number of images.",
        ("granularity", "cluster", "images"),
        sorted(rows, key=lambda row: -row[2]),
    )


def _clusters(known: Knowledge, which: Callable[[Granularity], np.ndarray]) -> list[tuple[int, int, int]]:
    return [
        (granularity.k, int(cluster), int(granularity.sizes[cluster]))
        for granularity in known.granularities
        for cluster in np.flatnonzero(which(granularity))
    ]
