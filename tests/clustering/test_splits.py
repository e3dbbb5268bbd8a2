"""Which clusters are split when others have become empty, and how."""

from __future__ import annotations

import torch

from pcl_fast.clustering.splits import drawn_by_size, split, widest


def test_the_widest_are_split_and_each_time_count_for_less():
    spread, splits = torch.tensor([0.3, 0.0, 0.5, 0.4]), torch.zeros(4, dtype=torch.int32)
    assert widest(spread, splits, 2).tolist() == [2, 3]
    assert splits.tolist() == [0, 0, 1, 1]
    assert widest(spread, splits, 2).tolist() == [0, 2]
    assert widest(spread, splits, 1).tolist() == [3]
    # What has no spread cannot be split, as many as are asked for.
    assert sorted(widest(spread, splits, 4).tolist()) == [0, 2, 3]
    assert widest(torch.zeros(4), splits, 1).tolist() == []


def test_the_first_of_equally_wide_ones_is_split():
    assert widest(torch.ones(70), torch.zeros(70, dtype=torch.int32), 3).tolist() == [0, 1, 2]


def test_chances_are_as_the_points_beyond_the_first():
    counts = torch.tensor([0, 1, 2, 4, 301])
    drawn = torch.cat([drawn_by_size(counts, 1, seed) for seed in range(3000)])
    found = torch.bincount(drawn, minlength=5) / 3000
    expected = torch.tensor([0, 0, 1, 3, 300]) / 304
    # Five standard deviations of the counts.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / 3000).sqrt()).all()


def test_each_is_drawn_once():
    assert sorted(drawn_by_size(torch.tensor([0, 1, 2, 4, 301]), 4, 0).tolist()) == [2, 3, 4]
    assert drawn_by_size(torch.tensor([0, 1, 1]), 2, 0).tolist() == []


def test_a_split_moves_two_centroids_apart_around_the_donor():
    centroids = torch.tensor([[1.0, 2.0], [9.0, 9.0], [5.0, 6.0]])
    halves = centroids.clone()
    split(halves, torch.tensor([False, True, False]), torch.tensor([0]))
    torch.testing.assert_close((halves[0] + halves[1]) / 2, centroids[0])
    assert not torch.equal(halves[0], halves[1])
    assert torch.equal(halves[2], centroids[2])


def test_without_donors_the_rest_stay_empty():
    centroids = torch.tensor([[1.0, 2.0], [9.0, 9.0], [5.0, 6.0]])
    halves = centroids.clone()
    split(halves, torch.tensor([False, True, True]), torch.tensor([0]))
    assert torch.equal(halves[2], centroids[2])
    assert not torch.equal(halves[1], centroids[1])
