"""Pairs drawn within and across clusters."""

from __future__ import annotations

import numpy as np
import pytest

from pcl_fast.clustering import draw_pairs

# Clusters of 1, 2, 7 and 10 images, and an empty one (2).
CLUSTERS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3, 4], [1, 2, 7, 10]))


@pytest.mark.parametrize("pairs", [8, 7, 1])
def test_half_of_the_pairs_are_within_a_cluster(pairs):
    found = draw_pairs(CLUSTERS, 20, pairs, seed=1)
    within = (CLUSTERS[found[:, 0]] == CLUSTERS[found[:, 1]]).reshape(20, pairs)
    assert within.sum() == 10 * pairs
    assert set(within.sum(1)) <= {pairs // 2, (pairs + 1) // 2}
    assert (found[:, 0] != found[:, 1]).all()
    if pairs > 1:
        assert len(np.unique(within, axis=0)) > 2  # in random places


def test_clusters_and_their_images_are_drawn_uniformly():
    found = draw_pairs(CLUSTERS, 1500, 8, seed=2)
    within = CLUSTERS[found[:, 0]] == CLUSTERS[found[:, 1]]
    for rows, clusters in ((found[within], (1, 3, 4)), (found[~within], (0, 1, 3, 4))):
        for side in range(2):
            for cluster in (0, 1, 3, 4):
                members = np.flatnonzero(cluster == CLUSTERS)
                share = 1 / len(clusters) / len(members) if cluster in clusters else 0
                seen = np.bincount(rows[:, side], minlength=20)[members] / len(rows)
                assert np.abs(seen - share).max() < 0.02


def test_pairs_depend_on_the_seed_alone():
    one, again, other = (draw_pairs(CLUSTERS, 4, 6, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("assignment", [[0, 0, 0], [0, 1, 2]])
def test_without_pairs_there_is_an_error(assignment):
    with pytest.raises(ValueError, match="no pairs can be drawn: 3 images are in"):
        draw_pairs(np.array(assignment), 1, 2, seed=0)
