"""Images that cannot be decoded: finding, reporting and leaving them out."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import run_ranks

from pcl_fast.data import ImageFolder, check_headers, find_broken, find_images, find_shards, open_set, usable
from pcl_fast.data.__main__ import main
from pcl_fast.data.sources import check
from pcl_fast.distributed import World
from pcl_fast.errors import ImageError

BROKEN = {
    "b/cut.jpg": r"image file is truncated",
    "b/empty.jpg": r"^it is empty$",
    "b/link.jpg": r"^No such file or directory$",
    "c/text.jpg": r"^no known image format$",
}


@pytest.fixture
def root(tmp_path) -> Path:
    """Three classes of three good images, and one of each kind of broken ones."""
    for label in "abc":
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            Image.effect_noise((40, 40), 80).save(tmp_path / "images" / label / f"{number}.jpg")
    whole = (tmp_path / "images" / "a" / "0.jpg").read_bytes()
    (tmp_path / "images" / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "b" / "empty.jpg").touch()
    (tmp_path / "images" / "b" / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "images" / "c" / "text.jpg").write_text("this is no JPEG")
    return tmp_path / "images"


@pytest.fixture
def images(root) -> ImageFolder:
    return find_images(root, strict=False)


def pack(root: Path, shard: Path) -> Path:
    """The images of the root as one shard; returns its folder."""
    shard.parent.mkdir(exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for path in sorted(root.glob("*/*.jpg")):
            if path.exists():  # not the link
                tar.add(path, path.relative_to(root).as_posix())
    return shard.parent


def test_every_broken_image_is_found_with_its_reason(images):
    broken = find_broken(images, threads=2)
    assert [images.paths[index] for index in broken] == list(BROKEN)
    for index, reason in broken.items():
        assert re.search(BROKEN[images.paths[index]], reason)


def test_broken_members_of_shards_are_found(root, tmp_path):
    images = find_shards(pack(root, tmp_path / "shards" / "1.tar"))
    broken = find_broken(images, threads=2)
    assert [images.members[index] for index in broken] == [name for name in BROKEN if name != "b/link.jpg"]


def test_some_images_alone(images):
    index = images.paths.index("b/empty.jpg")
    assert find_broken(images, [0, index, 1], threads=2) == {index: "it is empty"}
    assert find_broken(images, [], threads=2) == {}


def test_progress_and_how_many_are_under_way(images, monkeypatch):
    monkeypatch.setattr(check, "_TURN", 2)
    under_way, done = [], []
    read = ImageFolder.read
    monkeypatch.setattr(ImageFolder, "read", lambda self, index: under_way.append(index) or read(self, index))

    def progress(count):
        done.append(count)
        assert len(under_way) == count

    assert len(find_broken(images, threads=2, progress=progress)) == len(BROKEN)
    assert done == [4, 8, 12, 13]


def test_no_thread_is_refused(images):
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        find_broken(images, threads=0)


def test_headers_of_files_are_read_without_the_rest(images, monkeypatch):
    def refuse(self, index):
        raise AssertionError("read as a whole")

    monkeypatch.setattr(ImageFolder, "load", refuse)
    check_headers(images.subset([0, 1, 2, images.paths.index("b/cut.jpg")]))
    with pytest.raises(ImageError, match=r"3 of 13 files .*b/empty\.jpg: it is empty"):
        check_headers(images)


@pytest.mark.filterwarnings("error")
def test_transparency_is_told_and_passed_over(tmp_path):
    plain = Image.new("RGB", (8, 8), "red")
    plain.save(tmp_path / "0.png")
    assert check_headers(find_images(tmp_path)) == []
    plain.convert("RGBA").save(tmp_path / "1.png")
    plain.quantize(2).save(tmp_path / "2.png", transparency=bytes([0, 128]))
    images = find_images(tmp_path)
    [line] = check_headers(images)
    assert line.startswith("warning: 2 of 3 files looked at say how transparent their pixels are.")
    for index in range(3):
        assert np.array_equal(images.read(index), np.asarray(plain))


def test_headers_of_members(root, tmp_path):
    images = find_shards(pack(root, tmp_path / "shards" / "1.tar"))
    with pytest.raises(ImageError, match=r"2 of 12 files .*1\.tar, member b/empty\.jpg: it is empty"):
        check_headers(images)
    with pytest.raises(ImageError, match=r"1 of 4 files .*1\.tar, member c/text\.jpg: no known image format"):
        check_headers(images, rank=2, size=3)


def test_both_formats_are_opened(root, tmp_path):
    assert len(open_set(root, "folder", strict=False)) == 13
    with pytest.raises(ImageError, match=r"link\.jpg: No such file"):
        open_set(root, "folder")
    shards = pack(root, tmp_path / "shards" / "1.tar")
    assert len(open_set(shards, "webdataset")) == 12
    with pytest.raises(ImageError, match=r"no images but \.tar files; .*--data\.format webdataset"):
        open_set(shards, "folder")
    with pytest.raises(ImageError, match=r"--data\.format folder"):
        open_set(root, "webdataset")
    with pytest.raises(ValueError, match="folder or webdataset, got 'zip'"):
        open_set(root, "zip")


def decodes_nothing(monkeypatch):
    def refuse(self, index):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(ImageFolder, "read", refuse)


def test_broken_images_are_left_out_once_and_for_all(images, tmp_path, alone, monkeypatch):
    record = tmp_path / "run" / "broken.json"
    kept, left_out = usable(images, record, alone, threads=2)
    assert left_out == len(BROKEN)
    assert kept.paths == tuple(path for path in images.paths if path not in BROKEN)
    assert kept.labels == (0, 0, 0, 1, 1, 1, 2, 2, 2)
    written = json.loads(record.read_text())
    assert written["data"] == images.fingerprint()
    assert written["broken"].keys() == BROKEN.keys()
    assert written["broken"]["b/empty.jpg"] == "it is empty"
    assert [path.name for path in record.parent.iterdir()] == ["broken.json"]

    (images.root / "c" / "text.jpg").write_bytes((images.root / "a" / "0.jpg").read_bytes())  # mended: too late
    decodes_nothing(monkeypatch)
    assert usable(images, record, alone, threads=2) == (kept, left_out)


def test_nothing_is_left_out_of_whole_images(images, tmp_path, alone, monkeypatch):
    whole = images.subset([0, 1, 2])
    assert usable(whole, tmp_path / "broken.json", alone, threads=2) == (whole, 0)
    decodes_nothing(monkeypatch)
    assert usable(whole, tmp_path / "broken.json", alone, threads=2) == (whole, 0)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"data": "other images", "broken": {}}', '{"data": null'])
def test_a_record_of_something_else_is_written_anew(images, tmp_path, alone, text):
    record = tmp_path / "broken.json"
    record.write_text(text)
    assert usable(images, record, alone, threads=2)[1] == len(BROKEN)
    assert json.loads(record.read_text())["data"] == images.fingerprint()


def test_a_record_without_its_images_is_written_anew(images, tmp_path, alone):
    record = tmp_path / "broken.json"
    for broken in ("null", "[1]", "7"):
        record.write_text(f'{{"data": "{images.fingerprint()}", "broken": {broken}}}')
        assert usable(images, record, alone, threads=2)[1] == len(BROKEN)


def test_a_record_that_cannot_be_written_whole_is_not_there(images, tmp_path, alone, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        usable(images, tmp_path / "run" / "broken.json", alone, threads=2)
    assert not list((tmp_path / "run").iterdir())


def test_nothing_but_broken_images(images, tmp_path, alone):
    broken = images.subset([index for index, path in enumerate(images.paths) if path in BROKEN])
    with pytest.raises(ImageError, match=r"none of the 4 images can be decoded, the first is .*b/cut\.jpg: image file"):
        usable(broken, tmp_path / "broken.json", alone, threads=2)
    assert not (tmp_path / "broken.json").exists()


def usable_on_ranks(world: World, images: ImageFolder, record: Path) -> tuple[list[int], tuple[str, ...], int]:
    """What this rank decoded, and what was left to it."""
    decoded, read = [], ImageFolder.read
    ImageFolder.read = lambda self, index: decoded.append(index) or read(self, index)
    try:
        # The others may not see the file, or another one.
        kept, left_out = usable(images, record if world.is_main else record / "elsewhere", world, threads=2)
    finally:
        ImageFolder.read = read
    return sorted(decoded), kept.paths, left_out


def test_ranks_decode_their_shares_and_agree(images, tmp_path, alone):
    record = tmp_path / "run" / "broken.json"
    (first, kept, left_out), (second, other_kept, other_left_out) = run_ranks(2, usable_on_ranks, images, record)
    assert [*first, *second] == list(range(13))
    assert len(first) == 6
    assert kept == other_kept == usable(images, tmp_path / "alone.json", alone, threads=1)[0].paths
    assert left_out == other_left_out == len(BROKEN)
    assert record.read_text() == (tmp_path / "alone.json").read_text()
    assert run_ranks(2, usable_on_ranks, images, record) == [([], kept, left_out)] * 2


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pcl_fast.data", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_command_names_broken_images(root):
    done = run("check", str(root), "--threads", "2")
    assert done.returncode == 1
    assert done.stderr == ""
    found, *lines, summary = done.stdout.splitlines()
    assert found == f"13 images of 3 classes in {root}"
    assert summary == "4 of 13 images cannot be decoded"
    assert [line.split(": ")[0] for line in lines] == [str(root / name) for name in BROKEN]
    assert lines[1].endswith("b/empty.jpg: it is empty")


def test_command_on_whole_shards(image_folder, tmp_path):
    shards = pack(image_folder, tmp_path / "shards" / "1.tar")
    done = run("check", str(shards), "--format", "webdataset")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"53 images without labels in {shards}\nall 53 images can be decoded\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (
            ["check", "nowhere"],
            "pcl_fast.data: nowhere is not a folder; --data wants a folder of class folders, or of im",
        ),
        (["check", ".", "--threads", "0"], "pcl_fast.data: threads must be at least 1, got 0"),
        (["check", ".", "--format", "zip"], 2),
        (["check"], 2),
        ([], 2),
    ],
)
def test_command_refuses_in_one_line(root, monkeypatch, arguments, code):
    monkeypatch.chdir(root / "a")
    monkeypatch.setattr(sys, "argv", ["pcl_fast.data", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    if isinstance(code, int):
        assert ended.value.code == code
    else:
        assert str(ended.value.code).startswith(code)
        assert "\n" not in ended.value.code


def test_what_cannot_be_read_for_the_moment_is_not_left_out_for_good(tmp_path, image_folder, alone, monkeypatch):
    images = find_images(image_folder)
    load = ImageFolder.load

    def failing(self, index):
        if index == 3:
            raise OSError(errno.EIO, "Input/output error")
        return load(self, index)

    monkeypatch.setattr(ImageFolder, "load", failing)
    assert find_broken(images, threads=2) == {3: "Input/output error"}
    with pytest.raises(ImageError, match=r"03\.jpg: Input/output error"):
        usable(images, tmp_path / "broken.json", alone, threads=2)
    assert not (tmp_path / "broken.json").exists()
    monkeypatch.undo()
    assert usable(images, tmp_path / "broken.json", alone, threads=2) == (images, 0)
