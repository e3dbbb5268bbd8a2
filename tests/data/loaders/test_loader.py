"""Which images are loaded, when, by whom, and with which randomness: of both loaders."""

from __future__ import annotations

import importlib.util
import itertools
import time
from dataclasses import replace

import pytest
import torch

from pcl_fast.augmentations import AUGMENTATIONS, View, multi_crop
from pcl_fast.config import DataConfig, view_of
from pcl_fast.data import Batch, TrainingLoader, clustering_loader, find_images, training_loader
from pcl_fast.data.loaders import torchvision_loader
from pcl_fast.data.loaders.loader import pick_loader
from pcl_fast.distributed import World
from pcl_fast.errors import ImageError, MissingPackageError

KINDS = ("dali", "torchvision") if importlib.util.find_spec("nvidia.dali") else ("torchvision",)
CONFIG = DataConfig(size=16, resize=20, workers=0)
V1, V2, DIGITS = (replace(AUGMENTATIONS[name], size=24) for name in ("v1", "v2", "digits"))
# As BYOL and multi-crop have them, with one between that is distorted.
SEVERAL = [V2, replace(V2, blur_share=0.1, solarise_share=0.5), DIGITS, *[replace(V2, size=8, min_area=0.05)] * 2]


def rank_of(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"), None)


def loader(folder, world, kind, batch_size=5, seed=3, views=None, **changes) -> TrainingLoader:
    """Of two views of the configuration's, or of those given."""
    config = replace(CONFIG, loader=kind, **changes)
    views = (view_of(config),) * 2 if views is None else views
    return training_loader(folder, config, views=views, batch_size=batch_size, seed=seed, world=world)


def equal(one: Batch, other: Batch) -> bool:
    pairs = zip((*one.views, one.index), (*other.views, other.index), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


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
            whole.views[0][whole.index.argsort()],
            torch.cat([half.views[0] for half in halves])[index.argsort()],
        )


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_are_shuffled_differently(folder, kind):
    training = loader(folder, rank_of(0, 1), kind)
    first, second = (torch.cat([batch.index for batch in training.epoch(epoch)]).tolist() for epoch in (0, 1))
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize(
    "views", [[V1, V1], [V2, V2], [DIGITS, DIGITS], SEVERAL], ids=["v1", "v2", "digits", "several"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_views_do_not_depend_on_workers_or_on_where_the_epoch_began(folder, kind, views):
    whole = list(loader(folder, rank_of(0, 1), kind, views=views).epoch(2))
    with_workers = list(loader(folder, rank_of(0, 1), kind, views=views, workers=2, prefetch=4).epoch(2))
    resumed = list(loader(folder, rank_of(0, 1), kind, views=views).epoch(2, first_step=4))
    assert len(whole) == 10
    for one, other in zip([*whole, *whole[4:]], [*with_workers, *resumed], strict=True):
        assert equal(one, other)
    again = next(iter(loader(folder, rank_of(0, 1), kind, views=views).epoch(3)))
    assert not torch.equal(again.views[0], whole[0].views[0])
    assert not torch.equal(*whole[0].views[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_views_come_in_their_order_each_of_its_own_kind(folder, kind):
    """View number v of an image depends on v and on what is asked for there, not on the views beside it."""
    found = next(loader(folder, rank_of(0, 1), kind, views=SEVERAL).epoch(1))
    assert [list(view.shape) for view in found.views] == [[5, view.size, view.size, 3] for view in SEVERAL]
    for number, view in enumerate(SEVERAL):
        alike = next(loader(folder, rank_of(0, 1), kind, views=[view] * len(SEVERAL)).epoch(1))
        assert torch.equal(alike.index, found.index)
        assert torch.equal(alike.views[number], found.views[number])
        assert not any(torch.equal(alike.views[number], other) for other in alike.views[:number])


@pytest.mark.parametrize("kind", KINDS)
def test_small_crops_leave_the_large_ones_as_they_are(folder, kind):
    """Byte for byte, in every batch; and no two crops of an image are alike."""
    large = [V2, V2]
    small = multi_crop(V2, 3, size=14, areas=(0.05, 0.14))
    alone = loader(folder, rank_of(0, 1), kind, views=large).epoch(1)
    beside = loader(folder, rank_of(0, 1), kind, views=[*large, *small]).epoch(1)
    for two, five in zip(alone, beside, strict=True):
        assert equal(two, Batch(five.views[:2], five.index))
        assert [view.shape for view in five.views[2:]] == [(5, 14, 14, 3)] * 3
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(five.views[2:], 2))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_decoded_once_for_all_its_views(folder, kind, monkeypatch):
    read = []
    load = type(folder).load
    monkeypatch.setattr(type(folder), "load", lambda self, index: read.append(index) or load(self, index))
    batches = list(loader(folder, rank_of(0, 1), kind, views=SEVERAL).epoch(0))
    assert sorted(read) == sorted(index for batch in batches for index in batch.index.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_a_blur_that_kernels_cannot_make_is_refused(folder, kind):
    with pytest.raises(ValueError, match=r"sigma of at most 2.44 pixels, got 3.0"):
        loader(folder, rank_of(0, 1), kind, views=[View(sigma=(0.1, 3.0))])


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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_no_loader_draws_from_pytorch_s_generator(folder, kind, workers):
    """Or a run that begins an epoch a second time, having been stopped in its midst, would draw other numbers."""
    config = replace(CONFIG, loader=kind, workers=workers)
    before = torch.get_rng_state()
    next(iter(clustering_loader(folder, config, batch_size=4, world=rank_of(0, 1))))
    training = loader(folder, rank_of(0, 1), kind, workers=workers)
    for first in (0, 4):
        assert len(list(training.epoch(1, first))) == training.steps - first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_serve_epoch_after_epoch(folder, kind):
    training = loader(folder, rank_of(0, 1), kind, workers=1)
    for epoch in range(3):
        assert len(list(training.epoch(epoch, first_step=epoch))) == training.steps - epoch


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_bytes(folder, kind):
    config = replace(CONFIG, loader=kind, views="v2")
    world = rank_of(0, 1)
    training = training_loader(folder, config, views=[view_of(config)] * 2, batch_size=5, seed=0, world=world)
    batch = next(training.epoch(0))
    clustering = next(iter(clustering_loader(folder, config, batch_size=5, world=world)))
    for view in (*batch.views, clustering):
        assert view.shape == (5, 16, 16, 3)
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
    assert batch.index.dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_clustering_view_is_in_order_and_complete(folder, kind, ranks):
    """53 images divide neither among 2 nor among 4 ranks."""
    config = replace(CONFIG, loader=kind)
    shards = [
        torch.cat(list(clustering_loader(folder, config, batch_size=4, world=rank_of(rank, ranks))))
        for rank in range(ranks)
    ]
    whole = torch.cat(list(clustering_loader(folder, config, batch_size=53, world=rank_of(0, 1))))
    assert len(whole) == 53
    assert torch.equal(torch.cat(shards), whole)


def test_workers_are_told_to_end_before_the_process_waits_for_them(folder, monkeypatch):
    """With pinned memory PyTorch's own handler waits five seconds for each worker that nobody has told."""
    handlers = []
    monkeypatch.setattr(torchvision_loader.atexit, "register", lambda *handler: handlers.append(handler))
    training = loader(folder, rank_of(0, 1), "torchvision", workers=2)
    for epoch in range(2):
        next(training.epoch(epoch))
    ours = [handler for handler in handlers if handler[0].__module__ == torchvision_loader.__name__]
    assert len(ours) == 1
    assert handlers[-1] == ours[0]  # the last that is registered is the first to be called
    workers = training._loader._iterator._workers
    assert all(worker.is_alive() for worker in workers)
    handler, *given = ours[0]
    begin = time.monotonic()
    handler(*given)
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - begin < 5
    del training
    handler(*given)  # of a loader that is gone


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
        replace(CONFIG, loader=kind, workers=workers),
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
