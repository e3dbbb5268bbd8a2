"""Which images are loaded, when, by whom, and with which randomness."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pcl_fast.config import DataConfig
from pcl_fast.data import TrainingLoader, clustering_loader, find_images
from pcl_fast.distributed import World
from pcl_fast.errors import ImageError

CONFIG = DataConfig(size=16, resize=20, workers=0)


def rank_of(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"), None)


def loader(folder, world, batch_size=5, workers=0, seed=3) -> TrainingLoader:
    config = dataclasses.replace(CONFIG, workers=workers)
    return TrainingLoader(folder, config, batch_size=batch_size, seed=seed, world=world)


@pytest.fixture
def folder(image_folder):
    return find_images(image_folder)


def test_ranks_share_each_epoch_without_overlap(folder):
    """53 images, 3 ranks of 5: three steps of 15; eight images are left out, others every epoch."""
    seen_over_epochs = set()
    for epoch in range(4):
        seen = [
            int(i) for rank in range(3) for batch in loader(folder, rank_of(rank, 3)).epoch(epoch) for i in batch.index
        ]
        assert len(seen) == len(set(seen)) == 45
        seen_over_epochs |= set(seen)
    assert seen_over_epochs == set(range(53))


def test_the_global_batch_does_not_depend_on_the_number_of_ranks(folder):
    one = [set(batch.index.tolist()) for batch in loader(folder, rank_of(0, 1), batch_size=12).epoch(1)]
    parts = [[batch.index for batch in loader(folder, rank_of(rank, 2), batch_size=6).epoch(1)] for rank in range(2)]
    assert one == [set(torch.cat(step).tolist()) for step in zip(*parts, strict=True)]


def test_epochs_are_shuffled_differently(folder):
    training = loader(folder, rank_of(0, 1))
    first, second = (torch.cat([batch.index for batch in training.epoch(epoch)]).tolist() for epoch in (0, 1))
    assert first != second
    assert first != sorted(first)


def test_views_do_not_depend_on_workers_or_on_where_the_epoch_began(folder):
    whole = list(loader(folder, rank_of(0, 1)).epoch(2))
    with_workers = list(loader(folder, rank_of(0, 1), workers=2).epoch(2))
    resumed = list(loader(folder, rank_of(0, 1)).epoch(2, first_step=4))
    for one, other in zip([*whole, *whole[4:]], [*with_workers, *resumed], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    again = next(iter(loader(folder, rank_of(0, 1)).epoch(3)))
    assert not torch.equal(again.query_view, whole[0].query_view)
    assert not torch.equal(whole[0].query_view, whole[0].key_view)


def test_workers_serve_epoch_after_epoch(folder):
    training = loader(folder, rank_of(0, 1), workers=1)
    for epoch in range(3):
        assert len(list(training.epoch(epoch, first_step=epoch))) == training.steps - epoch


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_clustering_view_is_in_order_and_complete(folder, ranks):
    """53 images divide neither among 2 nor among 4 ranks."""
    shards = [
        torch.cat(list(clustering_loader(folder, CONFIG, batch_size=4, world=rank_of(rank, ranks))))
        for rank in range(ranks)
    ]
    whole = torch.cat(list(clustering_loader(folder, CONFIG, batch_size=53, world=rank_of(0, 1))))
    assert len(whole) == 53
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_broken_in_its_middle_is_named_when_met(tmp_path, image_folder, workers):
    whole = (image_folder / "class_0" / "00.jpg").read_bytes()
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(whole if number != 2 else whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"2\.jpg"):
        list(loader(find_images(tmp_path), rank_of(0, 1), batch_size=2, workers=workers).epoch(0))
