"""What a run knows of its images: features, clusters at several granularities, neighbours, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pcl_fast.clustering import PrototypeSet
from pcl_fast.data import ImageFolder, ImageSet
from pcl_fast.exploring.neighbours import Nearest, nearest
from pcl_fast.exploring.progress import Bar

# How many of the nearest images and clusters are shown.
NEAREST_IMAGES, NEAREST_CLUSTERS = 12, 8


@dataclass(frozen=True)
class Labels:
    """The images' classes: of every image int64 [n], positions in `names`."""

    of: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Granularity:
    """The clusters of one granularity.

    k: how many there are.
    concentration: float32 [k], phi of equation 12: the smaller, the tighter.
    assignment: int64 [n], the nearest prototype of every image.
    distance: float32 [n], how far it is.
    margin: float32 [n], how much farther the second nearest prototype is; infinite where there is none.
    near: the nearest other clusters of every cluster.
    """

    k: int
    concentration: np.ndarray
    assignment: np.ndarray
    distance: np.ndarray
    margin: np.ndarray
    near: Nearest

    @cached_property
    def sizes(self) -> np.ndarray:
        """Images of every cluster, int64 [k]."""
        return np.bincount(self.assignment, minlength=self.k)

    @cached_property
    def _by_distance(self) -> tuple[np.ndarray, np.ndarray]:
        """All images by cluster and distance, and where each cluster begins, [k + 1]."""
        return np.lexsort((self.distance, self.assignment)), np.concatenate([[0], np.cumsum(self.sizes)])

    def members(self, cluster: int) -> np.ndarray:
        """Return the images of a cluster, the nearest to its prototype first."""
        order, begin = self._by_distance
        return order[begin[cluster] : begin[cluster + 1]]

    def majority(self, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
        """Return the commonest label of every cluster, int64 [k], -1 where it is empty; and its share, float32 [k]."""
        pairs, counts = np.unique(self.assignment * len(labels.names) + labels.of, return_counts=True)
        clusters, found = np.divmod(pairs, len(labels.names))
        label, most = np.full(self.k, -1), np.zeros(self.k, np.int64)
        # The last that is written to a place stays: the commonest, and of equals the first class.
        order = np.lexsort((-found, counts))
        label[clusters[order]], most[clusters[order]] = found[order], counts[order]
        return label, (most / np.maximum(self.sizes, 1)).astype(np.float32)

    def overlaps(self, other: Granularity) -> list[list[tuple[int, int]]]:
        """Return for every cluster the other granularity's clusters that its images are in, and how many images are in
        each, the most first.
        """
        pairs, counts = np.unique(self.assignment * other.k + other.assignment, return_counts=True)
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.k)]
        for place in np.argsort(-counts, kind="stable"):
            mine, theirs = divmod(int(pairs[place]), other.k)
            found[mine].append((theirs, int(counts[place])))
        return found


@dataclass(frozen=True)
class Knowledge:
    """What is known of n images, in an order in which those of a cluster lie together, so that what is looked at
    together is read together.

    images: to read; paths: relative to their folder, as text; labels: None where there are none.
    features: float32 [n, d] of unit length.
    granularities: from few clusters to many.
    neighbours: the nearest other images of every image.
    """

    images: ImageSet
    paths: tuple[str, ...]
    labels: Labels | None
    features: torch.Tensor
    granularities: tuple[Granularity, ...]
    neighbours: Nearest


def gather(images: ImageSet, features: torch.Tensor, prototypes: Sequence[PrototypeSet], bar: Bar) -> Knowledge:
    """Find out all that the site shows.

    Args:
        images: n of them.
        features: float32 [n, d] of unit length.
        prototypes: one set for every granularity, on the features' device.
        bar: is told how far it is.
    """
    sets = sorted(prototypes, key=lambda found: len(found.centroids))
    granularities = [_granularity(features, found, bar) for found in sets]
    order = _order(granularities)
    features = features[torch.from_numpy(order).to(features.device)]
    images = images.subset(order.tolist())
    with bar.phase("nearest images", len(images)) as progress:
        neighbours = nearest(features, features, NEAREST_IMAGES, not_itself=True, progress=progress)
    return Knowledge(
        images=images,
        paths=tuple(map(as_text, images.keys())),
        labels=_labels(images),
        features=features,
        granularities=tuple(_reordered(granularity, order) for granularity in granularities),
        neighbours=neighbours,
    )


def as_text(path: str) -> str:
    """Return a path as text. Bytes that are no UTF-8, which file systems allow and pages do not, become question
    marks.
    """
    return path.encode("utf-8", "replace").decode()


def _granularity(features: torch.Tensor, found: PrototypeSet, bar: Bar) -> Granularity:
    centroids = found.centroids.to(features.device).float()
    with bar.phase(f"nearest of {len(centroids)} prototypes", len(features)) as progress:
        two = nearest(features, centroids, 2, progress=progress)
    alone = two.distance.shape[1] < 2
    return Granularity(
        k=len(centroids),
        concentration=found.concentration.cpu().numpy(),
        assignment=two.index[:, 0],
        distance=two.distance[:, 0],
        margin=np.full(len(features), np.inf, np.float32) if alone else two.distance[:, 1] - two.distance[:, 0],
        near=nearest(centroids, centroids, NEAREST_CLUSTERS, not_itself=True),
    )


def _order(granularities: Sequence[Granularity]) -> np.ndarray:
    """By the coarsest cluster that most of a fine cluster's images are in, then by the next, down to the finest
    cluster, then by distance.
    """
    finest = granularities[-1]
    keys = []
    for coarser in granularities[:-1]:
        parent = np.array([found[0][0] if found else 0 for found in finest.overlaps(coarser)])
        keys.append(parent[finest.assignment])
    return np.lexsort((finest.distance, finest.assignment, *reversed(keys)))


def _reordered(granularity: Granularity, order: np.ndarray) -> Granularity:
    return Granularity(
        k=granularity.k,
        concentration=granularity.concentration,
        assignment=granularity.assignment[order],
        distance=granularity.distance[order],
        margin=granularity.margin[order],
        near=granularity.near,
    )


def _labels(images: ImageSet) -> Labels | None:
    if images.labels is None:
        return None
    present, of = np.unique(np.asarray(images.labels), return_inverse=True)
    # Tar shards number their classes.
    names = images.classes if isinstance(images, ImageFolder) else None
    return Labels(of, tuple(as_text(names[number]) if names else str(number) for number in present.tolist()))
