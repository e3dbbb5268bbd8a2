"""VOC's average precision of detections (Everingham et al. 2010, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

from pcl_fast.evaluation.average_precision import eleven_points, envelope_area, precision_recall
from pcl_fast.evaluation.detection.detecting import Detections


class Truth(NamedTuple):
    """The objects of an image.

    boxes: float32 [m, 4]: x1, y1, x2, y2 in pixels from the image's upper left corner.
    labels: int64 [m], from 1.
    difficult: bool [m].
    """

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


class VocAp(NamedTuple):
    """Average precisions in percent, float64 [classes], NaN for a class without objects that are not difficult.

    eleven: the mean of the envelope at eleven recalls: VOC2007's own.
    envelope: the area below the envelope: VOC's since 2010.
    """

    eleven: np.ndarray
    envelope: np.ndarray


def voc_average_precision(
    found: Sequence[Detections], truths: Sequence[Truth], classes: int, *, overlap: float = 0.5
) -> VocAp:
    """Score the detections in all images.

    A detection is right if the object of its class that it overlaps most has an intersection over union of at least
    `overlap` with it, and no surer detection has found that object before: then it is wrong. If that object is
    difficult, the detection is neither.

    Args:
        found: in every image.
        truths: of every image.
        classes: how many there are, without the background.
    """
    values = np.full((2, classes), np.nan)
    for label in range(1, classes + 1):
        scores, right, objects = _match(found, truths, label, overlap)
        if objects:
            curve = precision_recall(scores, right, objects)
            values[:, label - 1] = eleven_points(*curve), envelope_area(*curve)
    return VocAp(*(100 * values))


def _match(
    found: Sequence[Detections], truths: Sequence[Truth], label: int, overlap: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the scores of a class's detections, the surest first and without those that count for nothing; whether
    they are right, bool [m]; and how many objects there are to be found.
    """
    judged, objects = [], 0
    for number, (item, truth) in enumerate(zip(found, truths, strict=True)):
        mine, theirs = item.labels == label, truth.labels == label
        difficult = truth.difficult[theirs]
        objects += int((~difficult).sum())
        if mine.any():
            nearest = _nearest(item.boxes[mine], truth.boxes[theirs], overlap)
            judged += [
                (score, None if place is None else (number, place))
                for score, place in zip(item.scores[mine].tolist(), nearest, strict=True)
                if place is None or not difficult[place]
            ]
    judged.sort(key=lambda judgement: -judgement[0])
    taken: set[tuple[int, int]] = set()
    right = []
    for _, hit in judged:
        right.append(hit is not None and hit not in taken)
        taken.add(hit)
    return np.array([score for score, _ in judged]), np.array(right, bool), objects


def _nearest(boxes: np.ndarray, objects: np.ndarray, overlap: float) -> list[int | None]:
    """Return for every box [m, 4] which object [n, 4] it overlaps most, or None if that is not enough."""
    if not len(objects):
        return [None] * len(boxes)
    values, places = box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(objects).double()).max(1)
    return [place if value >= overlap else None for place, value in zip(places.tolist(), values.tolist(), strict=True)]
