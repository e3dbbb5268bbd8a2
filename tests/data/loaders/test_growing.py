"""Loaders of crops that grow: an epoch has the views of a loader that is made for its size."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from pcl_fast.augmentations import AUGMENTATIONS, multi_crop
from pcl_fast.config import DataConfig
from pcl_fast.crop_sizes import Stage
from pcl_fast.data import GrowingLoader, GrowingView, clustering_loader, describe_loader, find_images, training_loader
from pcl_fast.errors import UserError

KINDS = ("dali", "torchvision") if importlib.util.find_spec("nvidia.dali") else ("torchvision",)
CONFIG = DataConfig(size=20, resize=25, workers=0, sizes=(Stage(12, 2), Stage(16, 3)))
V2 = replace(AUGMENTATIONS["v2"], size=20)
SIZES = {0: 12, 1: 12, 2: 16, 3: 20, 9: 20}


@pytest.fixture
def folder(image_folder):
    return find_images(image_folder)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_s_views_are_those_of_a_loader_of_its_size(folder, alone, kind):
    """Those of multi-crop too, each in proportion; also when the epochs do not come in order."""
    options = {"batch_size": 5, "seed": 3, "world": alone}
    config = replace(CONFIG, loader=kind)
    growing = GrowingLoader(folder, config, views=[V2, replace(V2, size=10)], **options)
    assert growing.steps == 10
    for epoch in (0, 1, 9, 2, 3):
        size = SIZES[epoch]
        views = [replace(V2, size=size), replace(V2, size=size // 2)]
        expected = training_loader(folder, replace(config, sizes=()), views=views, **options)
        for first in (0, 7):
            found = list(growing.epoch(epoch, first))
            assert len(found) == 10 - first
            for one, other in zip(found, expected.epoch(epoch, first), strict=True):
                assert [view.shape for view in one.views] == [(5, size, size, 3), (5, size // 2, size // 2, 3)]
                assert torch.equal(one.index, other.index)
                assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_small_crops_keep_swav_s_proportion(folder, alone, kind):
    views = [V2, V2, *multi_crop(V2, 3, areas=(0.05, 0.14))]
    growing = GrowingLoader(folder, replace(CONFIG, loader=kind), views=views, batch_size=5, seed=3, world=alone)
    for epoch, small in {0: 5, 2: 7, 3: 9}.items():
        sides = [view.shape[1] for view in next(growing.epoch(epoch)).views]
        assert sides == [SIZES[epoch]] * 2 + [small] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_clustering_view_has_the_size_of_the_epoch(folder, alone, kind):
    config = replace(CONFIG, loader=kind)
    view = GrowingView(folder, config, batch_size=20, world=alone)
    for epoch in (0, 2, 3):
        size = SIZES[epoch]
        plain = replace(config, sizes=(), size=size, resize=size * 5 // 4)
        expected = torch.cat(list(clustering_loader(folder, plain, batch_size=20, world=alone)))
        assert expected.shape == (53, size, size, 3)
        assert torch.equal(torch.cat(list(view.at(epoch))), expected)


def test_the_processes_of_the_former_size_end(folder, alone):
    config = replace(CONFIG, loader="torchvision", workers=1)
    growing = GrowingLoader(folder, config, views=[V2], batch_size=5, seed=0, world=alone)
    before = set(multiprocessing.active_children())

    def working() -> set:
        return set(multiprocessing.active_children()) - before

    list(growing.epoch(1))
    old = working()
    list(growing.epoch(2))
    assert len(old) == len(working()) == 1
    assert not old & working()


def test_a_run_of_one_size_makes_its_loader_once(folder, alone):
    config = replace(CONFIG, sizes=(), loader="torchvision")
    view = GrowingView(folder, config, batch_size=20, world=alone)
    assert view.at(0) is view.at(1) is view.at(200)


def test_every_size_has_a_cache_of_its_own_while_there_is_room(folder, alone, tmp_path, monkeypatch):
    """Where there is none at the start, the run ends; later the clustering view is decoded every time."""
    config = replace(CONFIG, loader="torchvision", cache=tmp_path / "cache")
    view = GrowingView(folder, config, batch_size=20, world=alone)
    small = [torch.cat(list(view.at(0))) for _ in range(2)]
    assert torch.equal(*small)
    assert len(list(config.cache.iterdir())) == 1
    monkeypatch.setattr("shutil.disk_usage", lambda folder: namedtuple("Usage", "free")(100))
    with pytest.warns(UserWarning, match=r"has 1e-07 GB free.* The clustering view of 16 px is decoded every time"):
        larger = view.at(2)
    assert torch.cat(list(larger)).shape == (53, 16, 16, 3)
    assert len(list(config.cache.iterdir())) == 1
    with pytest.raises(UserError, match="has 1e-07 GB free"):
        GrowingView(folder, replace(config, cache=tmp_path / "other"), batch_size=20, world=alone)


def test_the_log_says_which_sizes_there_are(alone):
    said = describe_loader(replace(CONFIG, loader="torchvision"), alone)
    assert said.endswith("; crops of 12 px up to epoch 2, 16 px up to epoch 3, then 20 px")
    assert "crops" not in describe_loader(replace(CONFIG, loader="torchvision", sizes=()), alone)
