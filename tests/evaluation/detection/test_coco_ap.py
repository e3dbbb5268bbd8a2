"""COCO's average precisions of detections whose scores are known."""

from __future__ import annotations

import numpy as np
import pytest
from coco_sets import SIZE, write_coco
from faster_coco_eval.core import mask as rle

from pcl_fast.data.sources.coco import read_coco
from pcl_fast.evaluation.detection.coco_ap import coco_average_precision
from pcl_fast.evaluation.detection.detecting import Detections


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return read_coco(write_coco(tmp_path_factory.mktemp("coco")), "val2017")


def perfect(split, index: int) -> Detections:
    count = len(split.labels[index])
    masks = [rle.encode(np.asfortranarray(mask)) for mask in split.masks(index)]
    return Detections(split.boxes[index], np.full(count, 0.9, np.float32), split.labels[index] + 1, masks)


def score(found, split, masks: bool):
    numbers = [number for number, _ in split.categories]
    return coco_average_precision(found, split.ids, numbers, split.annotations, masks=masks)


@pytest.mark.parametrize("masks", [False, True])
def test_everything_is_found(split, masks):
    """But for the two red objects that have no area or no outline, which COCO's own annotations have too."""
    found = [perfect(split, index) for index in range(len(split))]
    # Precision is looked up at recalls of 0, 0.01, ..., 1. All green objects are found, but only 4 of 6 red ones.
    expected = 100 * (67 / 101 + 1) / 2
    assert score(found, split, masks) == pytest.approx((expected,) * 3)


@pytest.mark.parametrize("masks", [False, True])
def test_wrong_classes_score_nothing(split, masks):
    found = [item._replace(labels=3 - item.labels) for item in (perfect(split, index) for index in range(len(split)))]
    assert score(found, split, masks) == (0, 0, 0)


def test_nothing_found(split):
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), [])
    assert score([nothing] * len(split), split, False) == (0, 0, 0)


def test_boxes_half_right(split):
    """Each covers 0.6 of its object, which is enough at 0.5, 0.55 and 0.6 of ten thresholds."""
    found = []
    for index in range(len(split)):
        item = perfect(split, index)
        boxes = item.boxes.copy()
        boxes[:, 2] = boxes[:, 0] + 0.62 * (boxes[:, 2] - boxes[:, 0])
        found.append(item._replace(boxes=boxes))
    whole = score([perfect(split, index) for index in range(len(split))], split, False).mean
    assert score(found, split, False) == pytest.approx((0.3 * whole, whole, 0))


def test_masks_are_what_counts(split):
    """Boxes are right, but the masks are a row and a column of them."""
    found = []
    for index in range(len(split)):
        item = perfect(split, index)
        masks = np.zeros((len(item.labels), *SIZE), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, item.boxes.astype(int), strict=True):
            mask[y1, x1:x2] = mask[y1:y2, x1] = 1
        found.append(item._replace(masks=[rle.encode(np.asfortranarray(mask)) for mask in masks]))
    assert score(found, split, True) == (0, 0, 0)
    assert score(found, split, False).mean > 50
