"""Training and test images of the same classes, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from class_folders import write_images

from pcl_fast.errors import ImageError
from pcl_fast.evaluation.labelled import holds_labelled, holds_labels, open_labelled, open_training


@pytest.fixture
def halves(tmp_path) -> Path:
    for part in ("train", "val"):
        write_images(tmp_path / part)
    return tmp_path


def test_labels_count_the_classes(halves):
    found = open_labelled(halves)
    assert found.classes == ("class_0", "class_1", "class_2")
    assert found.train_labels.bincount().tolist() == found.test_labels.bincount().tolist() == [18, 18, 17]
    assert found.describe() == "53 training and 53 test images of 3 classes"
    assert holds_labelled(halves) is None


@pytest.mark.parametrize(("part", "others"), [("train", "training"), ("val", "test")])
def test_a_class_of_one_part_alone(halves, part, others):
    """An empty folder is a class without images."""
    shutil.rmtree(halves / part / "class_1")
    (halves / part / "class_1").mkdir()
    with pytest.raises(ImageError, match=f"1 of 3 classes are not among the {others} images: class_1; training and"):
        open_labelled(halves)


def test_no_labels(halves):
    flat = halves / "flat" / "train"
    flat.mkdir(parents=True)
    shutil.copy(halves / "train" / "class_0" / "00.jpg", flat)
    with pytest.raises(ImageError, match="the training images have no labels; they must lie in class folders"):
        open_training(halves / "flat")


def test_a_part_is_missing(halves):
    shutil.rmtree(halves / "val")
    assert holds_labelled(halves) == f"{halves} has no folders train and val, nor Places205's lists"
    with pytest.raises(ImageError, match="val is missing; --data wants a folder with train and val in it"):
        open_labelled(halves)


def test_training_images_may_be_the_folder_itself(halves, tmp_path_factory):
    whole, labels = open_training(halves / "train")
    same, same_labels = open_training(halves)
    assert whole.keys() == same.keys()
    assert labels.tolist() == same_labels.tolist()
    assert holds_labels(halves) is holds_labels(halves / "train") is None
    empty = tmp_path_factory.mktemp("empty")
    assert holds_labels(empty) == f"{empty} has no class folders"
