"""When there is an E-step, when an evaluation, and what a rank's share of the batch is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pcl_fast.config import Config
from pcl_fast.schedule import clusters_before, evaluates_before, rank_batch


def config(*, epochs: int = 6, ks: tuple[int, ...] = (5,), warmup: int = 2, every: int = 4) -> Config:
    base = Config(epochs=epochs)
    return replace(
        base,
        cluster=replace(base.cluster, ks=ks, warmup_epochs=warmup),
        evaluation=replace(base.evaluation, every=every),
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [2, 3, 4, 5, 6]),
        ({"warmup": 0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"warmup": 6}, [6]),
        ({"warmup": 7}, []),
        ({"ks": ()}, []),
    ],
)
def test_clustering_begins_after_warm_up_and_ends_after_the_last_epoch(changes, expected):
    assert [epoch for epoch in range(7) if clusters_before(config(**changes), epoch)] == expected


@pytest.mark.parametrize(
    ("every", "expected"), [(4, [0, 4, 6]), (3, [0, 3, 6]), (1, [*range(7)]), (9, [0, 6]), (0, [])]
)
def test_evaluation_comes_every_nth_epoch_and_after_the_last(every, expected):
    assert [epoch for epoch in range(7) if evaluates_before(config(every=every), epoch)] == expected


def test_ranks_share_the_batch():
    assert [rank_batch(Config(), ranks) for ranks in (1, 4, 8)] == [256, 64, 32]
