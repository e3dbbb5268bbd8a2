"""Which images are loaded, when, by whom, and with which randomness: of both loaders."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from pcl_fast.config import DataConfig
from pcl_fast.data import TrainingLoader, clustering_loader, find_images, training_loader
from pcl_fast.data.loaders.loader import pick_loader
from pcl_fast.distributed import World
from pcl_fast.errors import ImageError, MissingPackageError

KINDS = ("dali", "torchvision") if importlib.util.find_spec("nvidia.dali") else ("torchvision",)
CONFIG = DataConfig(size=16, resize=20, workers=0)


def rank_of(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"), None)


def loader(folder, world, kind, batch_size=5, seed=3, **changes) -> TrainingLoader:
    config = dataclasses.replace(CONFIG, loader=kind, **changes)
    return training_loader(folder, config, batch_size=batch_size, seed=seed, world=world)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def folder(image_folder):
    return find_images(image_folder)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_each_epoch_without_overlap(folder, kind):
    """53 images, 3 ranks of 5: three steps of 15; eight images are left out, others every epoch."""
    seen_over_epochs = set()
    loaders = [loader(folder, rank_of(rank, 3), kind) for rank in range(3)]
    for epoch in range(5):
        seen = [int(i) for one in loaders for batch in one.epoch(epoch) for i in batch.index]
        assert len(seen) == len(set(seen)) == 45
        seen_over_epochs |= set(seen)
    assert seen_over_epochs == set(range(53))


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(folder, kind):
    one = list(loader(folder, rank_of(0, 1), kind, batch_size=12).epoch(1))
    parts = [list(loader(folder, rank_of(rank, 2), kind, batch_size=6).epoch(1)) for rank in range(2)]
    for whole, *halves in zip(one, *parts, strict=True):
        index = torch.cat([half.index for half in halves])
        assert sorted(whole.index.tolist()) == sorted(index.tolist())
        assert torch.equal(
            whole.query_view[whole.index.argsort()],
            torch.cat([half.query_view for half in halves])[index.argsort()],
        )


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_are_shuffled_differently(folder, kind):
    training = loader(folder, rank_of(0, 1), kind)
    first, second = (torch.cat([batch.index for batch in training.epoch(epoch)]).tolist() for epoch in (0, 1))
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("views", ["v1", "v2", "digits"])
@pytest.mark.parametrize("kind", KINDS)
def test_views_do_not_depend_on_workers_or_on_where_the_epoch_began(folder, kind, views):
    whole = list(loader(folder, rank_of(0, 1), kind, views=views).epoch(2))
    with_workers = list(loader(folder, rank_of(0, 1), kind, views=views, workers=2, prefetch=4).epoch(2))
    resumed = list(loader(folder, rank_of(0, 1), kind, views=views).epoch(2, first_step=4))
    assert len(whole) == 10
    for one, other in zip([*whole, *whole[4:]], [*with_workers, *resumed], strict=True):
        assert equal(one, other)
    again = next(iter(loader(folder, rank_of(0, 1), kind, views=views).epoch(3)))
    assert not torch.equal(again.query_view, whole[0].query_view)
    assert not torch.equal(whole[0].query_view, whole[0].key_view)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_left_early_leaves_nothing_behind(folder, kind):
    training = loader(folder, rank_of(0, 1), kind, workers=1)
    expected = list(training.epoch(1))
    for steps in (1, 3):
        batches = training.epoch(0)
        for _ in range(steps):
            next(batches)
        batches.close()
        assert all(equal(*pair) for pair in zip(training.epoch(1), expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_workers_serve_epoch_after_epoch(folder, kind):
    training = loader(folder, rank_of(0, 1), kind, workers=1)
    for epoch in range(3):
        assert len(list(training.epoch(epoch, first_step=epoch))) == training.steps - epoch


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_bytes(folder, kind):
    config = dataclasses.replace(CONFIG, loader=kind, views="v2")
    world = rank_of(0, 1)
    training = training_loader(folder, config, batch_size=5, seed=0, world=world)
    batch = next(training.epoch(0))
    clustering = next(iter(clustering_loader(folder, config, batch_size=5, world=world)))
    for view in (batch.query_view, batch.key_view, clustering):
        assert view.shape == (5, 16, 16, 3)
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
    assert batch.index.dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_clustering_view_is_in_order_and_complete(folder, kind, ranks):
    """53 images divide neither among 2 nor among 4 ranks."""
    config = dataclasses.replace(CONFIG, loader=kind)
    shards = [
        torch.cat(list(clustering_loader(folder, config, batch_size=4, world=rank_of(rank, ranks))))
        for rank in range(ranks)
    ]
    whole = torch.cat(list(clustering_loader(folder, config, batch_size=53, world=rank_of(0, 1))))
    assert len(whole) == 53
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_broken_in_its_middle_is_named_when_met(tmp_path, image_folder, kind, workers):
    whole = (image_folder / "class_0" / "00.jpg").read_bytes()
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(whole if number != 2 else whole[: len(whole) // 2])
    training = loader(find_images(tmp_path), rank_of(0, 1), kind, batch_size=2, workers=workers)
    with pytest.raises(ImageError, match=r"cannot read image .*2\.jpg"):
        list(training.epoch(0))
    clustering = clustering_loader(
        find_images(tmp_path),
        dataclasses.replace(CONFIG, loader=kind, workers=workers),
        batch_size=2,
        world=rank_of(0, 1),
    )
    with pytest.raises(ImageError, match=r"cannot read image .*2\.jpg"):
        list(clustering)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"this is no JPEG", None])
def test_a_file_that_is_no_image_or_gone_is_named(tmp_path, image_folder, kind, content):
    whole = (image_folder / "class_0" / "00.jpg").read_bytes()
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(whole)
    training = loader(find_images(tmp_path), rank_of(0, 1), kind, batch_size=2)
    if content is None:
        (tmp_path / "1.jpg").unlink()
    else:
        (tmp_path / "1.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"cannot read image .*1\.jpg"):
        list(training.epoch(0))


@pytest.mark.skipif("dali" not in KINDS, reason="needs DALI, which the requirements install")
def test_dali_is_the_default_where_it_can_be_imported(monkeypatch):
    assert pick_loader("auto") == pick_loader("dali") == "dali"
    assert pick_loader("torchvision") == "torchvision"

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    assert pick_loader("auto") == "torchvision"
    with pytest.raises(MissingPackageError, match=r"nvidia-dali-cuda130 .* --data.loader torchvision"):
        pick_loader("dali")
