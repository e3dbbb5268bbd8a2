"""Folders that are not what --data wants are named, with what to do."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from pcl_fast.config import PRESETS
from pcl_fast.data import find_images, find_shards, open_set
from pcl_fast.data.__main__ import check
from pcl_fast.errors import ImageError
from pcl_fast.evaluation.labelled import open_training
from pcl_fast.train import open_images

DEMO = PRESETS["demo"][1]


def tree(root: Path, image: Path, *names: str) -> Path:
    """Copies of an image under these names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, root / name)
    return root


@pytest.fixture
def image(image_folder) -> Path:
    return image_folder / "class_0" / "00.jpg"


@pytest.mark.parametrize(
    "names",
    [("train/a/1.jpg", "val/a/1.jpg"), ("train/1.jpg", "test/1.jpg"), ("train/a/1.jpg", "train/b/1.jpg")],
    ids=" ".join,
)
def test_the_parent_of_train_and_val_is_refused(tmp_path, image, names):
    root = tree(tmp_path, image, *names)
    for opening in (find_images, check):  # what train.py and `data check` open a folder by
        with pytest.raises(ImageError, match=rf"parts of a data set .*; train on {root / 'train'}$"):
            opening(root)
    assert len(find_images(root / "train")) >= 1


def test_what_evaluation_opens_is_that_parent(tmp_path, image):
    images, labels = open_training(tree(tmp_path, image, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"))
    assert (images.classes, labels.tolist()) == (("a", "b"), [0, 1])


def test_classes_beside_one_called_train_are_classes(tmp_path, image):
    images = find_images(tree(tmp_path, image, "bus/1.jpg", "train/1.jpg"))
    assert images.classes == ("bus", "train")


def test_the_parent_of_shards_is_refused(tmp_path, image):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as tar:
        tar.add(image, "0.jpg")
    with pytest.raises(ImageError, match=f"train on {tmp_path / 'train'}$"):
        open_set(tmp_path, "webdataset")
    assert len(find_shards(tmp_path / "train")) == 1


def refuse(monkeypatch, function: str, *closed: Path) -> None:
    """Let a function of os fail for some paths, as it does for those who are not root."""
    real = getattr(os, function)

    def refusing(path, *args, **kwargs):
        if Path(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, function, refusing)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, image, monkeypatch):
    root = tree(tmp_path, image, "a/1.jpg", "b/1.jpg", "b/deep/1.jpg", "lost+found/x")
    for closed in (root / "b", root / "b" / "deep", root):
        with monkeypatch.context() as patch:
            refuse(patch, "scandir", closed)
            for opening in (find_images, check):
                with pytest.raises(ImageError, match=f"cannot look into the folder {closed}/?: Permission denied"):
                    opening(root)
    refuse(monkeypatch, "scandir", root / "lost+found")
    assert find_images(root).paths == ("a/1.jpg", "b/1.jpg", "b/deep/1.jpg")


@pytest.mark.parametrize(
    ("target", "reason"), [("gone", "No such file or directory"), ("b", "Too many levels of symbolic links")]
)
def test_a_class_that_is_a_link_to_nowhere_is_named(tmp_path, image, target, reason):
    root = tree(tmp_path, image, "a/1.jpg")
    (root / "b").symlink_to(target)
    with pytest.raises(ImageError, match=f"cannot look into the folder {root / 'b'}: {reason}"):
        find_images(root, strict=False)


@pytest.mark.parametrize(
    ("link", "target"),
    [("a/loop", "."), ("a/loop", ".."), ("loop", "."), ("a/loop", "../.."), ("a/loop", "../b"), ("0", "b")],
)
def test_images_are_found_once_whatever_links_there_are(tmp_path, image, link, target):
    root = tree(tmp_path / "root", image, "a/1.jpg", "a/sub/2.jpg", "b/1.jpg")
    (root / link).symlink_to(target)
    with pytest.warns(UserWarning, match=f"1 links lead to folders that are looked at anyway.* {root / link}$"):
        images = find_images(root)
    assert images.paths == ("a/1.jpg", "a/sub/2.jpg", "b/1.jpg")
    assert images.labels == (0, 0, 1)


def test_links_to_elsewhere_are_followed_once(tmp_path, image):
    elsewhere = tree(tmp_path / "elsewhere", image, "cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg")
    (elsewhere / "cat" / "deep" / "loop").symlink_to("..")
    root = tree(tmp_path / "root", image, "bird/1.jpg")
    for name in ("cat", "dog"):
        (root / name).symlink_to(elsewhere / name)
    (root / "bird" / "more").symlink_to("../cat")
    with pytest.warns(UserWarning, match=f"2 links .* {root / 'bird' / 'more'}$"):
        images = find_images(root)
    assert images.paths == ("bird/1.jpg", "cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg")


@pytest.mark.parametrize("name", ["", "runs", "a/runs"])
def test_an_output_among_the_images_is_refused(tmp_path, image, alone, name):
    root = tree(tmp_path / "images", image, "a/1.jpg")
    (tmp_path / "link").symlink_to(root)
    inside = replace(DEMO, output=tmp_path / "link" / name, data=replace(DEMO.data, root=root))
    with pytest.raises(ImageError, match=f"--output {inside.output} lies inside --data {root}, so that"):
        open_images(inside, alone)
    open_images(replace(inside, output=tmp_path / "images-run"), alone)


@pytest.mark.parametrize("name", ["", "new", "new/deep"])
def test_an_output_that_a_link_among_the_images_leads_to_is_refused(tmp_path, image, alone, name):
    root, runs = tree(tmp_path / "images", image, "a/1.jpg"), tmp_path / "runs"
    runs.mkdir()
    (root / "a" / "mine").symlink_to(runs)
    inside = replace(DEMO, output=runs / name, data=replace(DEMO.data, root=root))
    said = (
        f"--output {inside.output} lies inside --data {root}, by the link {root / 'a' / 'mine'}, so that its pictures"
    )
    with pytest.raises(ImageError, match=said):
        open_images(inside, alone)
    assert os.listdir(runs) == []
    open_images(replace(inside, output=tmp_path / "runs-of-others"), alone)


def test_what_was_found_is_said_at_the_start(tmp_path, image, alone, capsys):
    classes = tree(tmp_path / "classes", image, "a/1.jpg", "b/1.jpg")
    flat = tree(tmp_path / "flat", image, "1.jpg")
    for root in (classes, flat):
        open_images(replace(DEMO, data=replace(DEMO.data, root=root)), alone)
    assert capsys.readouterr().out.splitlines() == [
        f"training on 2 images of 2 classes in {classes}",
        f"training on 1 images without labels in {flat}",
    ]
