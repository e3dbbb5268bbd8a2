"""COCO's average precisions of boxes and masks, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from faster_coco_eval import COCO, COCOeval_faster

from pcl_fast.evaluation.detection.detecting import Detections


class CocoAp(NamedTuple):
    """Average precisions in percent: the mean over intersections over union of 0.5, 0.55, ..., 0.95, and at 0.5 and
    0.75.
    """

    mean: float
    at_50: float
    at_75: float


def coco_average_precision(
    found: Sequence[Detections], ids: Sequence[int], categories: Sequence[int], annotations: Path, *, masks: bool
) -> CocoAp:
    """Score the detections in all images.

    Args:
        found: in every image.
        ids: COCO's numbers of the images.
        categories: COCO's numbers of the detections' labels 1, 2, ...
        annotations: the file instances_*.json, crowds and all.
        masks: score masks instead of boxes.
    """
    what = _masks if masks else _boxes
    results = [
        {"image_id": int(number), "category_id": int(categories[label - 1]), "score": score, **shape}
        for number, item in zip(ids, found, strict=True)
        for label, score, shape in zip(item.labels.tolist(), item.scores.tolist(), what(item), strict=True)
    ]
    if not results:
        return CocoAp(0.0, 0.0, 0.0)
    truth = COCO(str(annotations))
    scoring = COCOeval_faster(truth, truth.loadRes(results), "segm" if masks else "bbox")
    scoring.evaluate()
    scoring.accumulate()
    scoring.summarize()
    return CocoAp(*(100 * float(value) for value in scoring.stats[:3]))


def _boxes(item: Detections) -> list[dict[str, Any]]:
    return [{"bbox": [x1, y1, x2 - x1, y2 - y1]} for x1, y1, x2, y2 in item.boxes.tolist()]


def _masks(item: Detections) -> list[dict[str, Any]]:
    return [{"segmentation": mask} for mask in item.masks]
