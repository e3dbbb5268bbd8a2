"""Images that give way in the system's memory to the cache, where memory is enough for one of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pcl_fast.config import DataConfig
from pcl_fast.data import clustering_loader, find_images
from pcl_fast.data.loaders import memory
from pcl_fast.data.loaders.memory import leave_room, memory_bytes
from pcl_fast.distributed import World

CONFIG = DataConfig(size=16, resize=20, workers=0, loader="torchvision", cache=Path("cache"))
CACHE = 53 * 16 * 16 * 3
ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def images(image_folder):
    return find_images(image_folder)


def files(images) -> int:
    return sum(len(images.encoded(index)) for index in range(len(images)))


@pytest.mark.parametrize(
    ("spare", "cache", "kept"),
    [(1, True, False), (-1, True, False), (0, True, True), (2, True, True), (1, False, True)],
    ids=["either fits", "both fit but for a byte", "the cache does not fit", "both fit", "no cache"],
)
def test_images_give_way_where_either_fits_but_not_both(images, monkeypatch, spare, cache, kept):
    size = CACHE + {1: 1, -1: files(images) - 1, 0: 0, 2: files(images)}[spare]
    monkeypatch.setattr(memory, "memory_bytes", lambda: size)
    found = leave_room(images, CONFIG if cache else replace(CONFIG, cache=None), ALONE)
    assert found.kept is kept
    assert replace(found, kept=True) == images


def test_the_cache_is_that_of_this_machine_s_ranks(images, monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda: CACHE // 2 + 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not leave_room(images, CONFIG, World(1, 4, torch.device("cpu"), None)).kept
    assert leave_room(images, CONFIG, World(1, 2, torch.device("cpu"), None)).kept


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "max", tmp_path / "missing"))
    for text, expected in (("1000\n", 1000), ("max\n", whole), (f"{2 * whole}\n", whole)):
        (tmp_path / "max").write_text(text)
        assert memory_bytes() == expected


def test_the_loader_reads_images_that_give_way(images, tmp_path, monkeypatch):
    """The same bytes, and every file that is read is forgotten."""
    forgotten = []
    monkeypatch.setattr(memory, "memory_bytes", lambda: CACHE + 1)
    monkeypatch.setattr("os.posix_fadvise", lambda *args: forgotten.append(args[1:]))
    config = replace(CONFIG, cache=tmp_path)
    view = clustering_loader(images, config, batch_size=8, world=ALONE)
    forgotten.clear()
    found = torch.cat(list(view))
    assert len(forgotten) == 53
    assert set(forgotten) == {(0, 0, os.POSIX_FADV_DONTNEED)}
    plain = clustering_loader(images, replace(CONFIG, cache=None), batch_size=8, world=ALONE)
    assert torch.equal(found, torch.cat(list(plain)))
    assert len(forgotten) == 53


@pytest.mark.parametrize("call", ["missing", "refused"])
def test_a_system_that_cannot_forget(images, monkeypatch, call):
    def refused(*_):
        raise OSError

    if call == "missing":
        monkeypatch.delattr("os.posix_fadvise")
    else:
        monkeypatch.setattr("os.posix_fadvise", refused)
    assert replace(images, kept=False).load(3) == images.load(3)
