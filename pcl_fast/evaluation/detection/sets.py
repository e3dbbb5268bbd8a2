"""VOC and COCO as detectors want them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcl_fast.data import ImageFolder, ImageSet
from pcl_fast.data.sources.coco import TEST, TRAIN, CocoSplit, read_coco
from pcl_fast.data.sources.voc import VocObjects, VocSplit, read_annotation, read_split
from pcl_fast.errors import ImageError
from pcl_fast.evaluation.detection.data import Annotated
from pcl_fast.evaluation.detection.voc_ap import Truth


@dataclass(frozen=True)
class VocSets:
    """VOC's trainval images of some years, without objects that are marked difficult, and VOC2007's test images.

    train: images that have other objects than difficult ones.
    test: the test images; truths: their objects, difficult ones too.
    """

    train: Annotated
    test: ImageSet
    truths: Sequence[Truth]


@dataclass(frozen=True)
class CocoSets:
    """COCO's train2017 and val2017.

    train: images that have objects.
    crowds, degenerate: how many objects of the training images were left out, as in CocoSplit.
    test: the test images, with crowds only in its file.
    """

    train: Annotated
    crowds: int
    degenerate: int
    test: CocoSplit


def open_voc(folder: Path, years: Sequence[int]) -> VocSets:
    """Read trainval of these years, and test of 2007, with all annotations.

    Raises:
        ImageError: a year, a list, an image or an annotation is missing, or an annotation cannot be read.
    """
    splits = [read_split(folder, year, "trainval") for year in years]
    test = read_split(folder, 2007, "test")
    truths = [_as_truth(read_annotation(test.annotation(index))) for index in range(len(test.ids))]
    known = [_as_truth(read_annotation(split.annotation(index))) for split in splits for index in range(len(split.ids))]
    kept = [~truth.difficult & _has_area(truth.boxes) for truth in known]
    boxes = [truth.boxes[rows] for truth, rows in zip(known, kept, strict=True)]
    labels = [truth.labels[rows] for truth, rows in zip(known, kept, strict=True)]
    train = Annotated(_joined(splits), boxes, labels).with_objects()
    return VocSets(train, test.images, truths)


def open_coco(folder: Path) -> CocoSets:
    """Read train2017 and val2017 with all annotations.

    Raises:
        ImageError: as `read_coco`; or the two have different categories.
    """
    train, test = (read_coco(folder, split) for split in (TRAIN, TEST))
    if train.categories != test.categories:
        raise ImageError(f"{train.annotations} and {test.annotations} have different categories")
    labels = [labels + 1 for labels in train.labels]
    annotated = Annotated(train.images, train.boxes, labels, train.masks).with_objects()
    return CocoSets(annotated, train.crowds, train.degenerate, test)


def _as_truth(objects: VocObjects) -> Truth:
    """Number labels from 1. VOC counts pixels from 1 and means all of the last one: a box of a single pixel, 1 to 1,
    reaches from 0 to 1.
    """
    boxes = objects.boxes.numpy() - np.array([1, 1, 0, 0], np.float32)
    return Truth(boxes, objects.labels.numpy() + 1, objects.difficult.numpy())


def _has_area(boxes: np.ndarray) -> np.ndarray:
    return ((boxes[:, 2:] > boxes[:, :2]) & np.isfinite(boxes).all(1, keepdims=True)).all(1)


def _joined(splits: Sequence[VocSplit]) -> ImageFolder:
    """Return the images of all splits, whose roots may be anywhere, as one data set."""
    root = Path(os.path.commonpath([split.root.absolute() for split in splits]))
    paths = [
        (split.root.absolute() / path).relative_to(root).as_posix() for split in splits for path in split.images.paths
    ]
    return ImageFolder(root, tuple(paths), None, ())
