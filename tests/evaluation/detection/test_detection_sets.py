"""VOC and COCO as detectors want them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from coco_sets import change_coco, write_coco
from voc_sets import write_voc

from pcl_fast.data.sources.voc import VOC_CLASSES
from pcl_fast.errors import ImageError
from pcl_fast.evaluation.detection.sets import open_coco, open_voc

CAT, DOG = (VOC_CLASSES.index(name) + 1 for name in ("cat", "dog"))
IMAGES = {
    "000001": [("cat", (1, 2, 20, 30), False), ("cat", (10, 10, 48, 40), True)],
    "000002": [("dog", (5, 5, 9, 9), True)],
    "000007": [("dog", (3, 3, 3, 8), False), ("cat", (30, 5, 20, 9), False)],
}
TEST = {"000003": IMAGES["000001"], "000004": []}


def write(folder, years=(2007, 2012)):
    for year in years:
        names = IMAGES if year == 2007 else {f"{year}_{name}": objects for name, objects in IMAGES.items()}
        write_voc(folder, year, {"trainval": names, "test": TEST})
    return folder


def test_voc_s_training_images_without_difficult_objects(tmp_path):
    """An image with difficult ones alone is left out. A box of a single column of pixels is one pixel wide, and one
    whose right side is left of its left side is none.
    """
    train = open_voc(write(tmp_path), (2007,)).train
    assert train.images.keys() == ("JPEGImages/000001.jpg", "JPEGImages/000007.jpg")
    assert [boxes.tolist() for boxes in train.boxes] == [[[0, 1, 20, 30]], [[2, 2, 3, 8]]]
    assert [labels.tolist() for labels in train.labels] == [[CAT], [DOG]]
    assert train.boxes[0].dtype == np.float32


def test_two_years_wherever_they_lie(tmp_path):
    folder = write(tmp_path / "one")
    shutil.move(folder / "VOCdevkit" / "VOC2012", folder / "VOC2012")
    train = open_voc(folder, (2007, 2012)).train
    assert train.images.keys() == tuple(
        f"{home}/JPEGImages/{name}.jpg"
        for home, name in [
            ("VOCdevkit/VOC2007", "000001"),
            ("VOCdevkit/VOC2007", "000007"),
            ("VOC2012", "2012_000001"),
            ("VOC2012", "2012_000007"),
        ]
    )
    assert train.images.read(3).size == (48, 40)


def test_voc_s_test_images_are_all_there(tmp_path):
    sets = open_voc(write(tmp_path), (2007,))
    assert sets.test.keys() == ("JPEGImages/000003.jpg", "JPEGImages/000004.jpg")
    first, second = sets.truths
    assert first.boxes.tolist() == [[0, 1, 20, 30], [9, 9, 48, 40]]
    assert first.labels.tolist() == [CAT, CAT]
    assert first.difficult.tolist() == [False, True]
    assert second.boxes.shape == (0, 4)


def test_voc2012_is_missing(tmp_path):
    with pytest.raises(ImageError, match="holds no VOC2012"):
        open_voc(write(tmp_path, (2007,)), (2007, 2012))


@pytest.mark.parametrize("name", ["000001", "000003"])
def test_an_annotation_is_missing(tmp_path, name):
    """Of a training image, and of a test image."""
    path = write(tmp_path, (2007,)) / "VOCdevkit" / "VOC2007" / "Annotations" / f"{name}.xml"
    path.unlink()
    with pytest.raises(ImageError, match=f"{name}.xml is missing"):
        open_voc(tmp_path, (2007,))


def test_coco(tmp_path):
    sets = open_coco(write_coco(tmp_path))
    assert len(sets.train) == 4  # one of five has no object
    assert [labels.tolist() for labels in sets.train.labels] == [[1, 2]] * 4
    assert sets.train.masks(3).sum() == 26 * 20 + 20 * 26
    assert (sets.crowds, sets.degenerate) == (1, 2)
    assert len(sets.test) == 5


def test_coco_s_categories_must_be_the_same(tmp_path):
    write_coco(tmp_path)
    change_coco(tmp_path, "val2017", lambda content: content["categories"].append({"id": 9, "name": "blue"}))
    with pytest.raises(ImageError, match=r"instances_train2017.json and .* have different categories"):
        open_coco(tmp_path)
