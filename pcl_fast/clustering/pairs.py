"""Pairs of images within clusters and across them."""

from __future__ import annotations

import numpy as np


def draw_pairs(assignment: np.ndarray, batches: int, pairs: int, *, seed: int) -> np.ndarray:
    """Draw so many batches of pairs, in each of them one half within clusters and one half across, in random places (of
    an odd number one kind is ahead in turns).

    Clusters are drawn uniformly, whatever their size: for a pair within, of those that have two images; for a pair
    across, two of all that are not empty. Their images are drawn uniformly. A pair has two different images; an image
    may be in several pairs, also of one batch.

    Args:
        assignment: integers [n], the cluster of every image.
        batches, pairs: how many batches, of how many pairs each.
        seed: the same on every rank.

    Returns:
        int64 [batches * pairs, 2], positions in the data set.

    Raises:
        ValueError: fewer than two clusters have images, or none has two.
    """
    members = np.argsort(assignment, kind="stable")
    sizes = np.bincount(assignment)
    starts = np.cumsum(sizes) - sizes
    filled, several = np.flatnonzero(sizes), np.flatnonzero(sizes > 1)
    if len(filled) < 2 or not len(several):
        raise ValueError(
            f"no pairs can be drawn: {len(assignment)} images are in {len(filled)} clusters, {len(several)} of which "
            "have two images or more"
        )
    random = np.random.default_rng(seed)
    turns = np.add.outer(np.arange(batches), np.arange(pairs)) % 2 == 0
    within = random.permuted(turns, axis=1).ravel()
    first, second = _two_of(len(filled), len(within), random)
    inside = several[random.integers(len(several), size=len(within))]
    clusters = np.where(within, inside, filled[first]), np.where(within, inside, filled[second])
    places = [random.integers(sizes[cluster]) for cluster in clusters]
    # Within a cluster the second image is one of the others: places from the first one's on move up by one.
    other = random.integers(np.where(within, sizes[clusters[1]] - 1, 1))
    places[1] = np.where(within, other + (other >= places[0]), places[1])
    return np.stack([members[starts[cluster] + place] for cluster, place in zip(clusters, places, strict=True)], axis=1)


def _two_of(total: int, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`count` pairs of two different numbers below `total`, uniformly."""
    first, other = random.integers(total, size=count), random.integers(total - 1, size=count)
    return first, other + (other >= first)
