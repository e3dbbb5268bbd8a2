"""WebDataset shards: what is found in them, the index that is kept, and reading."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from pcl_fast.data import find_shards
from pcl_fast.data.sources import shards
from pcl_fast.distributed import World, main_first
from pcl_fast.errors import ImageError, UserError

Members = list[tuple[str, bytes]]


def write_shard(path: Path, members: Members, **options) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pcl_fast"


@pytest.fixture(scope="module")
def photos(image_folder) -> list[bytes]:
    return [path.read_bytes() for path in sorted(image_folder.glob("class_0/*.jpg"))]


@pytest.fixture
def root(tmp_path, photos) -> Path:
    """Ten labelled images in two shards, neither in the order of their names nor alone."""
    order = [3, 0, 4, 1, 2, 9, 5, 8, 6, 7]
    for shard, numbers in {"a-0001.tar": order[:6], "a-0000.tar": order[6:]}.items():
        members = [("notes.txt", b"no image"), ("._0.jpg", b"left by a Mac")]
        for number in numbers:
            members += [
                (f"x/{number}.json", b"{}"),
                (f"x/{number}.JPG" if number == 4 else f"x/{number}.jpg", photos[number]),
                (f"x/{number}.seg.png", b"not the image of the sample"),
                (f"x/{number}.cls", b"%d\n" % (number * 11)),
            ]
        write_shard(tmp_path / "shards" / shard, members)
    with tarfile.open(tmp_path / "shards" / "a-0000.tar", "a") as tar:
        folder = tarfile.TarInfo("x/folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    (tmp_path / "shards" / "README.md").write_text("no shard")
    (tmp_path / "shards" / "._a-0000.tar").write_text("left by a Mac")
    return tmp_path / "shards"


ORDER = [5, 8, 6, 7, 3, 0, 4, 1, 2, 9]


def no_tar_may_be_opened(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a tar was opened")

    monkeypatch.setattr(tarfile, "open", refuse)


def test_shards_by_name_then_members_as_they_come(root, photos):
    images = find_shards(root)
    assert len(images) == 10
    assert [images.load(index) for index in range(10)] == [photos[number] for number in ORDER]
    assert images.labels.dtype == np.int64
    assert torch.tensor(images.labels).tolist() == [11 * number for number in ORDER]
    assert images.name(4) == f"{root / 'a-0001.tar'}, member x/3.jpg"
    assert images.keys()[3:7] == [
        "a-0000.tar/x/7.jpg",
        "a-0001.tar/x/3.jpg",
        "a-0001.tar/x/0.jpg",
        "a-0001.tar/x/4.JPG",
    ]
    assert images.read(0).size == Image.open(io.BytesIO(photos[5])).size


def test_an_image_is_forgotten_by_itself(root, monkeypatch):
    """Not its neighbours in the shard."""
    kept, calls = find_shards(root), []
    monkeypatch.setattr("os.posix_fadvise", lambda descriptor, *args: calls.append(args))
    images = replace(kept, kept=False)
    assert images.load(3) == images.subset([3]).load(0) == kept.load(3)
    assert calls == [(int(kept.offset[3]), int(kept.size[3]), os.POSIX_FADV_DONTNEED)] * 2


def test_images_without_labels(tmp_path, photos):
    write_shard(tmp_path / "0.tar", [])
    write_shard(tmp_path / "1.tar", [("a.jpg", photos[0]), ("b.cls", b"label of nothing")])
    images = find_shards(tmp_path)
    assert images.keys() == ["1.tar/a.jpg"]
    assert (len(images), images.labels) == (1, None)
    assert find_shards(tmp_path).labels is None
    assert images.subset([0]).labels is None


def test_subset(root, photos):
    images = find_shards(root)
    some = images.subset(np.array([9, 0, 4])).subset([2, 0])
    assert [some.load(index) for index in range(2)] == [photos[3], photos[9]]
    assert some.labels.tolist() == [33, 99]
    assert some.keys() == ["a-0001.tar/x/3.jpg", "a-0001.tar/x/9.jpg"]
    assert len(images) == 10


def test_fingerprint_is_of_the_names_wherever_they_lie(root):
    images = find_shards(root)
    root.rename(root.parent / "moved")
    assert find_shards(root.parent / "moved").fingerprint() == images.fingerprint()
    assert images.subset([1, 0]).fingerprint() != images.subset([0, 1]).fingerprint()


@pytest.mark.parametrize("options", [{"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}])
def test_names_that_take_more_than_a_header(tmp_path, photos, options):
    names = ["f" * 150 + "/ü.jpg", "\udcff.jpg", "plain.jpg"]
    write_shard(tmp_path / "1.tar", list(zip(names, photos, strict=False)), **options)
    for images in (find_shards(tmp_path), find_shards(tmp_path)):
        assert images.keys() == [f"1.tar/{name}" for name in names]
        assert [images.load(index) for index in range(3)] == photos[:3]
        assert images.fingerprint()


def test_a_tar_without_its_end_blocks_is_whole(tmp_path, photos):
    write_shard(tmp_path / "1.tar", [("a.jpg", photos[0])])
    blocks = 1 + -(-len(photos[0]) // 512)
    os.truncate(tmp_path / "1.tar", blocks * 512)
    assert find_shards(tmp_path).load(0) == photos[0]


def test_the_index_is_written_once(root, monkeypatch):
    first = find_shards(root)
    assert {path.name for path in root.glob("[!.]*")} == {"README.md", "a-0000.tar", "a-0001.tar", shards.INDEX}
    no_tar_may_be_opened(monkeypatch)
    second = find_shards(root)
    for name in ("shard", "offset", "size", "labels"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()
    assert first.keys() == second.keys()


def renamed(root, photos):
    """Another member, but the same names and sizes of shards: only the time tells."""
    path = root / "a-0001.tar"
    before = path.stat()
    with tarfile.open(path) as tar:
        members = [(member.name.replace("x/3.", "x/y."), tar.extractfile(member).read()) for member in tar]
    write_shard(path, members)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size


def added(root, photos):
    write_shard(root / "b.tar", [("new.jpg", photos[0]), ("new.cls", b"0")])


def removed(root, photos):
    (root / "a-0000.tar").unlink()


@pytest.mark.parametrize("change", [renamed, added, removed])
def test_the_index_is_made_anew_when_the_shards_change(root, photos, monkeypatch, change):
    before = find_shards(root)
    change(root, photos)
    after = find_shards(root)
    assert after.keys() != before.keys()
    assert all(after.load(index) in photos for index in range(len(after)))
    no_tar_may_be_opened(monkeypatch)
    assert find_shards(root).keys() == after.keys()


def pickled(path):
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "text": np.array([object()], dtype=object)})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no index"),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(path.read_bytes().replace(b"x/3.jpg", b"x/y.jpg")),
        lambda path: np.save(open(path, "wb"), np.arange(3)),  # noqa: SIM115
        pickled,
    ],
    ids=["empty", "text", "cut", "one byte", "array", "pickled"],
)
def test_a_spoiled_index_is_made_anew(root, monkeypatch, spoil):
    keys = find_shards(root).keys()
    spoil(root / shards.INDEX)
    assert find_shards(root).keys() == keys
    no_tar_may_be_opened(monkeypatch)
    assert find_shards(root).keys() == keys


def test_the_index_of_another_version_is_made_anew(root, monkeypatch):
    find_shards(root)
    no_tar_may_be_opened(monkeypatch)
    monkeypatch.setattr(shards, "_VERSION", shards._VERSION + 1)
    with pytest.raises(AssertionError, match="a tar was opened"):
        find_shards(root)


def read_only(monkeypatch, *folders: Path):
    """Permissions mean nothing to root, who may be running the tests."""
    write = shards.write_whole

    def refuse(path, fill):
        if path.parent in folders:
            raise PermissionError(13, "Permission denied", str(path))
        write(path, fill)

    monkeypatch.setattr(shards, "write_whole", refuse)


def test_the_index_of_a_folder_that_cannot_be_written_is_in_the_cache(root, cache, photos, monkeypatch):
    read_only(monkeypatch, root)
    keys = find_shards(root).keys()
    assert not (root / shards.INDEX).exists()
    assert len(list(cache.iterdir())) == 1
    other = root.parent / "other"
    write_shard(other / "a.tar", [("1.jpg", photos[0])])
    read_only(monkeypatch, root, other)
    assert find_shards(other).keys() == ["a.tar/1.jpg"]
    no_tar_may_be_opened(monkeypatch)
    assert find_shards(root).keys() == keys
    assert find_shards(other).keys() == ["a.tar/1.jpg"]


def test_an_index_that_can_be_kept_nowhere_is_done_without(root, cache, monkeypatch):
    read_only(monkeypatch, root, cache)
    with pytest.warns(UserWarning, match=r"kept nowhere .*pcl_fast-index\.npz: Permission denied; .*cache"):
        assert len(find_shards(root)) == 10


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_failure_leaves_no_half_an_index(root, cache, monkeypatch, step):
    def fail(file, *_, **__):
        if step == "write":
            file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(*(np, "savez") if step == "write" else (os, "replace"), fail)
    with pytest.raises(KeyboardInterrupt):
        find_shards(root)
    assert not [path for path in root.iterdir() if path.suffix not in (".tar", ".md")]
    assert not cache.exists()
    monkeypatch.undo()
    assert len(find_shards(root)) == 10


def open_shards(root: Path) -> list[str]:
    """Where this process's descriptors of files below `root` lead."""
    targets = []
    for entry in os.scandir("/proc/self/fd"):
        try:
            targets.append(os.readlink(entry.path))
        except FileNotFoundError:  # of the listing itself
            continue
    return [target for target in targets if target.startswith(str(root))]


def test_threads_share_fewer_descriptors_than_shards(tmp_path, photos, monkeypatch):
    """Every descriptor is closed to make room for another while threads are about to read from it."""
    for number in range(6):
        write_shard(tmp_path / f"{number}.tar", [(f"{i}.jpg", photos[(number + i) % 18]) for i in range(6)])
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    images, pread, most = find_shards(tmp_path), os.pread, []

    def slow(*arguments):
        time.sleep(0.001)
        most.append(len(open_shards(tmp_path)))
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", slow)
    order = [index for index in range(36) for _ in range(10)]
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(images.load, order))
    assert found == [photos[(index // 6 + index % 6) % 18] for index in order]
    assert max(most) <= 2 + 8
    assert len(open_shards(tmp_path)) <= 2


def test_a_shard_is_opened_once(root, tmp_path, monkeypatch):
    images, opened, real = find_shards(root), [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or real(path, *rest))
    for index in [*range(10), *range(10)]:
        images.load(index)
        images.subset([index]).load(0)
    assert sorted(opened) == [str(root / "a-0000.tar"), str(root / "a-0001.tar")]
    assert len(open_shards(tmp_path)) == 2
    del images
    assert not open_shards(tmp_path)


def loads_what_it_should(images, photos) -> bool:
    return [images.load(index) for index in range(10)] == [photos[number] for number in ORDER]


def test_pickled_without_descriptors(root, tmp_path, photos):
    images = find_shards(root)
    images.load(0)
    copy = pickle.loads(pickle.dumps(images))
    assert len(open_shards(tmp_path)) == 1
    assert loads_what_it_should(copy, photos)
    assert loads_what_it_should(images, photos)
    assert copy.fingerprint() == images.fingerprint()
    assert copy.labels.tolist() == images.labels.tolist()


def test_a_forked_worker_reads_through_inherited_descriptors(root, photos):
    images = find_shards(root)
    images.load(0)
    if not (child := os.fork()):
        os._exit(0 if all(loads_what_it_should(images, photos) for _ in range(20)) else 1)
    assert all(loads_what_it_should(images, photos) for _ in range(20))
    assert os.waitpid(child, 0)[1] == 0


def test_a_shard_cut_off_later_is_named_with_the_image(root):
    images = find_shards(root)
    os.truncate(root / "a-0001.tar", int(images.offset[9]) + 100)
    with pytest.raises(OSError, match="only 100 of its"):
        images.load(9)
    with pytest.raises(ImageError, match=r"cannot read image .*a-0001\.tar, member x/9\.jpg: only 100 of its"):
        images.read(9)
    (root / "a-0001.tar").unlink()
    elsewhere = pickle.loads(pickle.dumps(images))
    with pytest.raises(ImageError, match=r"member x/9\.jpg: No such file"):
        elsewhere.read(9)


JPG = b"any bytes: the index does not look into them" * 20


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", JPG), ("a.png", JPG)], r"1\.tar, member a\.png is the second image of its sample, after a\.jpg"),
        ([("a.jpg", JPG), ("a.jpg", JPG)], r"1\.tar, member a\.jpg is the second image"),
        ([("a.cls", b"1"), ("a.cls", b"1"), ("a.jpg", JPG)], r"member a\.cls is the second label"),
        ([("a.jpg", JPG), ("b.jpg", JPG), ("a.json", b"")], r"1\.tar, member a\.json has the key a, which came before"),
        ([("a.cls", b"1"), ("b.cls", b"1"), ("a.jpg", JPG)], r"member a\.jpg has the key a, which came before"),
        ([("a.txt", JPG), ("noextension", JPG), ("b.c.jpg", JPG)], r"have no images \(\.jpg, .*first dot"),
        ([], "have no images"),
        (
            [("a.jpg", JPG), ("a.cls", b"cat")],
            r"1\.tar, member a\.cls is no label: b'cat'; a label is an integer from 0",
        ),
        ([("a.jpg", JPG), ("a.cls", b"-1")], r"member a\.cls is no label: b'-1'"),
        ([("a.jpg", JPG), ("a.cls", b"")], r"member a\.cls is no label: b''"),
        ([("a.jpg", JPG), ("a.cls", b"1234567890")], r"member a\.cls is no label: b'1234567890'"),
        ([("a.jpg", JPG), ("a.cls", "²".encode())], r"member a\.cls is no label"),
        (
            [("a.jpg", JPG), ("a.cls", b"0"), ("b.jpg", JPG), ("c.jpg", JPG)],
            r"2 of 3 images have no label, the first is .*1\.tar, member b\.jpg; give all of them a \.cls, or none",
        ),
    ],
)
def test_unusable_samples_are_named(tmp_path, members, message):
    write_shard(tmp_path / "1.tar", members)
    with pytest.raises(ImageError, match=message):
        find_shards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1.tar"]


def test_the_same_key_in_two_shards_is_two_samples(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", [("a.jpg", JPG), ("a.cls", b"%d" % number)])
    images = find_shards(tmp_path)
    assert images.keys() == ["0.tar/a.jpg", "1.tar/a.jpg"]
    assert images.labels.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_sparse_files_are_no_images(tmp_path, kind):
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = kind, "b.jpg"
        tar.addfile(member)
    with pytest.raises(ImageError, match=r"1\.tar, member a\.jpg is no plain file; .*tar -h"):
        find_shards(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        # Members take three blocks each: a header and two of data.
        (lambda path: os.truncate(path, 5 * 512), r"1\.tar has been cut off: member b\.jpg reaches beyond"),
        (lambda path: os.truncate(path, 3 * 512 + 200), r"1\.tar cannot be read as a tar behind member a\.jpg"),
        (lambda path: os.truncate(path, 100), r"1\.tar cannot be read as a tar behind its beginning"),
        (lambda path: os.truncate(path, 0), r"1\.tar cannot be read as a tar behind its beginning \(empty file\)"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"b.jpg", b"c.jpg")),
            r"behind member a\.jpg \(bad head",
        ),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(range(256)) * 9), r"1\.tar cannot be read as a tar"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), r"cannot read shard .*1\.tar: No such file"),
    ],
    ids=["data", "second header", "first header", "empty", "checksum", "no tar", "link"],
)
def test_damaged_shards_are_named(tmp_path, damage, message):
    write_shard(tmp_path / "0.tar", [("a.jpg", JPG)])
    write_shard(tmp_path / "1.tar", [("a.jpg", JPG), ("b.jpg", JPG)])
    damage(tmp_path / "1.tar")
    with pytest.raises(ImageError, match=message):
        find_shards(tmp_path)


def test_unusable_folders_are_named(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere is not a folder; --data wants a folder of \.tar shards"):
        find_shards(tmp_path / "nowhere")
    with pytest.raises(ImageError, match=r"has no \.tar shards in it; .*--data\.format folder"):
        find_shards(tmp_path)
    write_shard(tmp_path / "1.tar.gz", [("a.jpg", JPG)])
    with pytest.raises(ImageError, match=r"has compressed shards \(1\.tar\.gz, \.\.\.\), .*unpack them"):
        find_shards(tmp_path)


def index_on_ranks(world: World, root: Path) -> tuple[int, list[str], bytes]:
    """How many tars this rank opened, and what it found."""
    opened, real = [], tarfile.open
    tarfile.open = lambda path, *rest, **options: opened.append(path) or real(path, *rest, **options)
    try:
        images = main_first(lambda: find_shards(root), world)
    finally:
        tarfile.open = real
    return len(opened), images.keys(), images.load(9)


def test_one_rank_makes_the_index(root, photos):
    (tars, keys, last), (other_tars, other_keys, other_last) = run_ranks(2, index_on_ranks, root)
    assert (tars, other_tars) == (2, 0)
    assert keys == other_keys == find_shards(root).keys()
    assert last == other_last == photos[9]


def load_in_rank(world: World, images) -> bytes:
    return images.load(4 + world.rank)


def test_a_spawned_worker_opens_its_own_descriptors(root, photos):
    images = find_shards(root)
    images.load(4)
    assert run_ranks(2, load_in_rank, images) == [photos[3], photos[0]]


def fail_on_main(world: World, error: Exception) -> tuple[str, str, int]:
    calls = []

    def work():
        calls.append(None)
        if world.is_main:
            raise error

    try:
        main_first(work, world)
    except Exception as raised:
        return type(raised).__name__, str(raised), len(calls)
    return "nothing", "", len(calls)


@pytest.mark.parametrize("error", [ImageError("no images"), UserError("this"), ValueError("that")])
def test_what_the_main_rank_raises_is_raised_by_all(error):
    kind, text = type(error).__name__, str(error)
    assert run_ranks(2, fail_on_main, error) == [(kind, text, 1), (kind, text, 0)]


def test_main_first_alone(alone):
    calls = []
    assert main_first(lambda: calls.append(None) or 3, alone) == 3
    assert len(calls) == 1
    with pytest.raises(UserError, match="this"):
        main_first(lambda: (_ for _ in ()).throw(UserError("this")), alone)
