"""The clustering view from a cache on disk: the loader's bytes, whatever happens to the files."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib.util
import itertools
import os
import resource
import shutil
import time
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from launches import same_state, train
from PIL import Image

from pcl_fast.config import DataConfig
from pcl_fast.data import ImageSet, clustering_loader, describe_loader, find_images
from pcl_fast.data.loaders import cache, feeds
from pcl_fast.data.loaders.cache import CachedView
from pcl_fast.distributed import World
from pcl_fast.errors import UserError

KINDS = ("dali", "torchvision") if importlib.util.find_spec("nvidia.dali") else ("torchvision",)
# Where the crops lie.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CONFIG = DataConfig(size=16, resize=20, workers=0, loader="torchvision")
IMAGE_BYTES, HEADER_BYTES = 16 * 16 * 3, 4096


def world_of(rank: int = 0, size: int = 1, device: str = "cpu") -> World:
    return World(rank, size, torch.device(device, 0) if device == "cuda" else torch.device(device), None)


def loader(images: ImageSet, cache: Path | None, world: World | None = None, batch_size: int = 8, **changes):
    config = dataclasses.replace(CONFIG, cache=cache, **changes)
    return clustering_loader(images, config, batch_size=batch_size, world=world or world_of())


def equal(batches, expected) -> bool:
    return all(torch.equal(*pair) for pair in zip(list(batches), expected, strict=True))


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


class Spy:
    """Counts how often a loader is asked for its batches."""

    def __init__(self, wrapped):
        self.wrapped, self.passes, self.begins = wrapped, 0, []

    def __iter__(self):
        self.passes += 1
        return iter(self.wrapped)

    def batches(self, starts):
        self.begins.append([])
        return self.wrapped.batches(self.begins[-1].append(start) or start for start in starts)


def spied(cached: CachedView) -> tuple[CachedView, Spy]:
    cached.loader = Spy(cached.loader)
    return cached, cached.loader


@pytest.fixture(scope="module")
def images(image_folder) -> ImageSet:
    return find_images(image_folder)


@pytest.fixture(scope="module")
def expected(images) -> list[torch.Tensor]:
    return list(loader(images, None))


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "made" / "cache"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_gives_the_loader_s_batches(images, folder, kind, device):
    """53 images in batches of 8: the last one has five."""
    world = world_of(device=device)
    plain = list(loader(images, None, world, loader=kind))
    assert [len(batch) for batch in plain] == [8] * 6 + [5]
    cached, spy = spied(loader(images, folder, world, loader=kind))
    for passes in range(4):
        batches = list(cached)
        assert equal(batches, plain), passes
        for batch in batches:
            assert (batch.dtype, batch.device, batch.is_contiguous()) == (torch.uint8, world.device, True)
        assert spy.passes == 1
    assert [path.stat().st_size for path in files(folder)] == [HEADER_BYTES + 53 * IMAGE_BYTES]


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_run_does_not_decode(images, folder, kind):
    first = list(loader(images, folder, loader=kind))
    for batch_size in (8, 53, 5):
        cached, spy = spied(loader(images, folder, loader=kind, batch_size=batch_size))
        batches = list(cached)
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * ((53 - 1) // batch_size)
        assert torch.equal(torch.cat(batches), torch.cat(first))
        assert spy.passes == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_has_its_own_file(images, folder, expected, ranks):
    for _ in range(2):
        shards = [torch.cat(list(loader(images, folder, world_of(rank, ranks)))) for rank in range(ranks)]
        assert torch.equal(torch.cat(shards), torch.cat(expected))
    assert len(files(folder)) == ranks


def test_the_file_says_what_it_holds(images, folder):
    list(loader(images, folder))
    (path,) = files(folder)
    header = path.read_bytes()[:HEADER_BYTES].decode()
    for said in (
        images.fingerprint(),
        '"size": 16',
        '"resize": 20',
        '"begin": 0',
        '"end": 53',
        "torchvision",
        "Pillow",
    ):
        assert said in header


@pytest.mark.parametrize("changes", [{"size": 12}, {"resize": 24}, *({"loader": kind} for kind in KINDS[:-1])])
def test_other_crops_are_another_file(images, folder, expected, changes):
    list(loader(images, folder))
    assert equal(loader(images, folder, **changes), list(loader(images, None, **changes)))
    assert len(files(folder)) == 2
    assert equal(loader(images, folder), expected)


def test_other_images_are_another_file(images, folder, expected, tmp_path):
    """Fewer of them, another order, or others of the same names: a data set that was resized, say."""
    same_names = tmp_path / "same"
    shutil.copytree(images.root, same_names)
    for path in same_names.glob("*/*.jpg"):
        with Image.open(path) as image:
            image.resize((30, 30)).save(path)
    list(loader(images, folder))
    others = [images.subset(range(52)), images.subset(range(52, -1, -1)), find_images(same_names)]
    for number, other in enumerate(others, start=2):
        assert equal(loader(other, folder), list(loader(other, None)))
        assert len(files(folder)) == number
    assert equal(loader(images, folder), expected)


def test_the_same_images_elsewhere_are_the_same_file(images, folder, tmp_path):
    list(loader(images, folder))
    shutil.copytree(images.root, tmp_path / "moved")
    cached, spy = spied(loader(find_images(tmp_path / "moved"), folder, workers=1))
    list(cached)
    assert spy.passes == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_ends_early_leaves_nothing(images, folder, kind):
    cached = loader(images, folder, loader=kind, workers=1)
    plain = list(loader(images, None, loader=kind))
    for steps in (1, 7):  # after the seventh batch nobody asked whether there is another
        batches = iter(cached)
        for _ in range(steps):
            next(batches)
        assert [path.suffix for path in files(folder)] == [".part"]
        batches.close()
        assert files(folder) == []
    for _ in range(2):
        assert equal(cached, plain)
    batches = iter(cached)
    next(batches)
    batches.close()
    assert equal(cached, plain)
    assert len(files(folder)) == 1


def test_a_loader_that_fails_leaves_nothing(images, folder, expected):
    cached = loader(images, folder)

    def failing():
        yield from expected[:3]
        raise KeyboardInterrupt

    cached.loader = failing()
    with pytest.raises(KeyboardInterrupt):
        list(cached)
    assert files(folder) == []


def test_a_loader_that_ends_early_makes_no_file(images, folder, expected):
    cached = loader(images, folder)
    cached.loader = expected[:3]
    assert len(list(cached)) == 3
    assert files(folder) == []


@pytest.mark.parametrize("spoil", ["cut", "longer", "header", "empty"])
def test_a_spoiled_file_is_made_anew(images, folder, expected, spoil):
    list(loader(images, folder))
    (path,) = files(folder)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-1], "longer": whole + b"x", "header": b"x" + whole[1:], "empty": b""}[spoil])
    cached, spy = spied(loader(images, folder))
    for _ in range(2):
        assert equal(cached, expected)
    assert spy.passes == 1
    assert path.read_bytes() == whole


def test_what_a_killed_run_left_is_replaced(images, folder, expected):
    list(loader(images, folder))
    (path,) = files(folder)
    left = path.rename(f"{path}.part")
    left.write_bytes(b"x" * 100_000)
    assert equal(loader(images, folder), expected)
    assert files(folder) == [path]
    cached, spy = spied(loader(images, folder))
    assert equal(cached, expected)
    assert spy.passes == 0


def test_an_unfinished_part_takes_no_room(images, folder):
    """Even while a process that the loader has forked keeps it open."""
    batches = iter(loader(images, folder))
    next(batches), next(batches)
    with open(*files(folder), "rb") as held:
        assert held.seek(0, os.SEEK_END) > 0
        batches.close()
        assert held.seek(0, os.SEEK_END) == 0


def test_two_runs_do_not_write_the_same_file(images, folder, expected):
    one, other = loader(images, folder), loader(images, folder)
    first = iter(one)
    next(first)
    assert equal(other, expected)  # as decoded
    assert [path.suffix for path in files(folder)] == [".part"]
    list(first)
    (path,) = files(folder)
    assert path.suffix != ".part"
    cached, spy = spied(other)
    assert equal(cached, expected)
    assert spy.passes == 0


def test_a_part_that_was_finished_while_it_was_opened_is_left_alone(images, folder, expected, monkeypatch):
    """Another run's part becomes its file between opening and locking it."""
    list(loader(images, folder))
    (path,) = files(folder)
    part = path.rename(f"{path}.part")
    lock = fcntl.flock

    def renaming(file, how):
        if part.exists():
            part.rename(path)
        lock(file, how)

    monkeypatch.setattr("fcntl.flock", renaming)
    assert equal(loader(images, folder), expected)
    assert files(folder) == [path]
    cached, spy = spied(loader(images, folder))
    assert equal(cached, expected)
    assert spy.passes == 0


# --- room -----------------------------------------------------------------------------------------------------------


def free(monkeypatch, amount: int) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 0, amount)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)


def test_a_full_disk_is_said_before_anything_is_written(images, folder, monkeypatch):
    needed = HEADER_BYTES + 53 * IMAGE_BYTES
    free(monkeypatch, needed - 1)
    with pytest.raises(UserError, match=rf"--data.cache {folder} has 4.48e-05 GB free, but .* takes 4.48e-05 GB"):
        loader(images, folder)
    assert files(folder) == []
    free(monkeypatch, needed)
    list(loader(images, folder))
    free(monkeypatch, 0)  # nothing is to be written any more
    list(loader(images, folder))


def test_room_is_for_all_ranks_of_this_machine(images, folder, monkeypatch):
    """The third and fourth of four ranks are this machine's: images 26 to 53."""
    needed = 2 * HEADER_BYTES + 27 * IMAGE_BYTES
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (2, 3):
        monkeypatch.setenv("LOCAL_RANK", str(rank - 2))
        free(monkeypatch, needed - 1)
        with pytest.raises(UserError, match="GB free"):
            loader(images, folder, world_of(rank, 4))
        free(monkeypatch, needed)
        cached = loader(images, folder, world_of(rank, 4))
    list(cached)
    free(monkeypatch, HEADER_BYTES + 13 * IMAGE_BYTES)
    loader(images, folder, world_of(3, 4))


def test_what_a_killed_run_left_counts_as_room(images, folder, monkeypatch):
    list(loader(images, folder))
    (path,) = files(folder)
    part = path.rename(f"{path}.part")
    os.truncate(part, 8192)
    free(monkeypatch, HEADER_BYTES + 53 * IMAGE_BYTES - 512 * part.stat().st_blocks)
    loader(images, folder)
    free(monkeypatch, HEADER_BYTES + 53 * IMAGE_BYTES - 512 * part.stat().st_blocks - 1)
    with pytest.raises(UserError, match="GB free"):
        loader(images, folder)


def test_a_folder_that_cannot_be_written_is_named(images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"--data.cache {tmp_path}/file/cache cannot be written: .*another folder"):
        loader(images, tmp_path / "file" / "cache")


def test_a_folder_of_others_is_named_or_read(images, folder, expected, monkeypatch):
    def refused(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", refused)
        with pytest.raises(UserError, match=f"--data.cache {folder} cannot be written: .*Permission denied"):
            loader(images, folder)
    list(loader(images, folder))
    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert equal(loader(images, folder), expected)


def check_fallback(cached: CachedView, expected, folder: Path, fault) -> None:
    """One warning, all batches, and no more attempts."""
    with fault, pytest.warns(UserWarning, match="--data.cache: .* the clustering view is decoded every time") as said:
        assert equal(cached, expected)
    assert len(said) == 1
    cached, spy = spied(cached)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert equal(cached, expected)
    assert spy.passes == 2
    assert not any(path.stat().st_size for path in files(folder))


@contextlib.contextmanager
def files_at_most(length: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [100, HEADER_BYTES + 20 * IMAGE_BYTES, HEADER_BYTES + 53 * IMAGE_BYTES - 1])
def test_a_disk_that_fills_up_costs_nothing_but_the_cache(images, folder, kind, length):
    plain = list(loader(images, None, loader=kind))
    check_fallback(loader(images, folder, loader=kind), plain, folder, files_at_most(length))


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "fcntl.flock"])
def test_a_disk_that_fails_costs_nothing_but_the_cache(images, folder, expected, monkeypatch, call):
    """A network disk may be full only when the file is to be safe, or know no locks."""

    def failing(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(call, failing)
        check_fallback(loader(images, folder), expected, folder, contextlib.nullcontext())


def test_a_file_that_is_cut_while_it_is_read(images, folder, expected):
    list(loader(images, folder))
    (path,) = files(folder)
    cached, spy = spied(loader(images, folder, batch_size=1))
    single = torch.cat(expected).split(1)
    batches = iter(cached)
    found = [next(batches) for _ in range(5)]
    os.truncate(path, HEADER_BYTES + 20 * IMAGE_BYTES)
    with pytest.warns(UserWarning, match="has become shorter"):
        found += list(batches)
    assert equal(found, single)
    (begins,) = spy.begins  # not from the first on
    assert begins == list(range(begins[0], 53))
    assert begins[0] >= 5


def slow_disk(monkeypatch) -> None:
    """Reading a batch takes 20 ms, and help begins at once."""

    def read_late(*args) -> None:
        time.sleep(0.02)
        read(*args)

    read = cache._read_into
    monkeypatch.setattr(cache, "_read_into", read_late)
    monkeypatch.setattr(feeds, "_PATIENCE", 0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_disk_is_helped_with_the_same_bytes(images, folder, kind, device, monkeypatch):
    slow_disk(monkeypatch)
    world = world_of(device=device)
    plain = list(loader(images, None, world, loader=kind, batch_size=3))
    cached, spy = spied(loader(images, folder, world, loader=kind, batch_size=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert equal(cached, plain)
    assert spy.passes == 1
    assert len(set(itertools.chain.from_iterable(spy.begins))) >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fails_while_it_is_helped(images, folder, kind, monkeypatch):
    slow_disk(monkeypatch)
    plain = list(loader(images, None, loader=kind, batch_size=1))
    list(loader(images, folder, loader=kind))
    cached, spy = spied(loader(images, folder, loader=kind, batch_size=1))
    batches = iter(cached)
    found = [next(batches) for _ in range(20)]
    assert spy.begins
    os.truncate(*files(folder), HEADER_BYTES)
    with pytest.warns(UserWarning, match="has become shorter") as said:
        found += list(batches)
    assert equal(found, plain)
    assert len(said) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["gone", "changed"])
def test_images_that_cannot_help_are_read_from_the_cache(images, folder, expected, kind, fault, tmp_path, monkeypatch):
    slow_disk(monkeypatch)
    shutil.copytree(images.root, tmp_path / "copy")
    copy = find_images(tmp_path / "copy")
    plain = list(loader(copy, None, loader=kind))
    cached, spy = spied(loader(copy, folder, loader=kind))
    assert equal(cached, plain)
    for path in copy.root.glob("*/*.jpg"):
        path.unlink()
        if fault == "changed":
            Image.new("RGB", (30, 30)).save(path)
    said = {"gone": "cannot read image", "changed": "decode to other bytes than it holds"}[fault]
    with pytest.warns(UserWarning, match=f"without the help of idle cores: .*{said}") as warned:
        assert equal(cached, plain)
    assert equal(cached, plain)
    assert len(warned) == len(spy.begins) == 1


# --- runs -----------------------------------------------------------------------------------------------------------


def test_the_log_says_where_the_cache_is(folder):
    assert describe_loader(dataclasses.replace(CONFIG, cache=folder), world_of()).endswith(f"cached in {folder}")


@pytest.mark.slow
def test_a_run_with_a_cache_learns_the_same(two_ranks, image_folder, folder, tmp_path):
    for run in ("first", "again"):
        text = train(image_folder, tmp_path / run, "--data.cache", str(folder), ranks=2)
        assert f"clustering view cached in {folder}" in text
        same_state(two_ranks[0], tmp_path / run)
        assert len(files(folder)) == 2
