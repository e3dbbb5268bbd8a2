"""Folders that are not what --data wants are named, with what to do."""

from __future__ import annotations

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


def test_what_was_found_is_said_at_the_start(tmp_path, image, alone, capsys):
    classes = tree(tmp_path / "classes", image, "a/1.jpg", "b/1.jpg")
    flat = tree(tmp_path / "flat", image, "1.jpg")
    for root in (classes, flat):
        open_images(replace(DEMO, data=replace(DEMO.data, root=root)), alone)
    assert capsys.readouterr().out.splitlines() == [
        f"training on 2 images of 2 classes in {classes}",
        f"training on 1 images without labels in {flat}",
    ]
