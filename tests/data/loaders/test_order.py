"""An epoch's images, shuffled or given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pcl_fast.data.loaders.order import EpochOrder


def batches_of(alone, rank: int, given, first_step: int = 0) -> list[list[int]]:
    world = replace(alone, rank=rank, size=2)
    order = EpochOrder(13, batch_size=3, seed=0, world=world, given=given)
    return [batch.tolist() for batch in order.batches(1, first_step)]


def test_a_given_order_is_dealt_out_to_the_ranks(alone):
    def given(epoch):
        return np.arange(12, 0, -1) if epoch == 1 else None

    assert batches_of(alone, 0, given) == [[12, 10, 8], [6, 4, 2]]
    assert batches_of(alone, 1, given) == [[11, 9, 7], [5, 3, 1]]
    assert batches_of(alone, 1, given, first_step=1) == [[5, 3, 1]]


def test_images_of_a_given_order_may_come_again(alone):
    assert batches_of(alone, 0, lambda epoch: np.zeros(20, dtype=np.int64)) == [[0, 0, 0]] * 2


def test_without_one_the_epoch_is_shuffled(alone):
    order = EpochOrder(13, batch_size=3, seed=0, world=alone)
    found = [index for epoch in (0, 1) for batch in order.batches(epoch) for index in batch.tolist()]
    assert sorted(found[:12]) != found[:12]
    assert found[:12] != found[12:]
    assert all(len(set(part)) == 12 for part in (found[:12], found[12:]))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (np.arange(11), "must be 12 positions or more.*got 11 from 0 to 10"),
        (np.arange(2, 15), r"each in \[0, 13\); got 13 from 2 to 14"),
        (np.array([], dtype=np.int64), "got 0$"),
    ],
)
def test_an_order_that_does_not_fit_is_refused(alone, order, message):
    with pytest.raises(ValueError, match=message):
        batches_of(alone, 0, lambda epoch: order)
