"""When there is an E-step, when an evaluation, and what a rank's share of the batch is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pcl_fast.config import Config
from pcl_fast.crop_sizes import Stage
from pcl_fast.schedule import clusters_before, evaluates_before, rank_batch, steps_left


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


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (0, {160: 20, 192: 10, 224: 30}),
        (1, {160: 19, 192: 10, 224: 30}),
        (25, {192: 5, 224: 30}),
        (30, {224: 30}),
        (60, {}),
    ],
)
def test_steps_that_are_left_by_what_their_crops_are(done, expected):
    grows = config()
    grows = replace(grows, data=replace(grows.data, sizes=(Stage(160, 2), Stage(192, 3))))
    left = steps_left(grows, 10, done)
    assert {data.size: steps for data, steps in left.items()} == expected
    assert sum(steps_left(config(), 10, done).values()) == 60 - done
