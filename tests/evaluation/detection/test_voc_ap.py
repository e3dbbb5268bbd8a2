"""VOC's average precision, against hand-computed cases and a slow version of the development kit's rules."""

from __future__ import annotations

import numpy as np
import pytest

from pcl_fast.evaluation.detection.detecting import Detections
from pcl_fast.evaluation.detection.voc_ap import Truth, voc_average_precision


def detections(*found) -> Detections:
    """(score, label, box) of each."""
    boxes = np.array([box for _, _, box in found], np.float32).reshape(-1, 4)
    return Detections(boxes, np.array([s for s, _, _ in found], np.float32), np.array([c for _, c, _ in found], int))


def truth(*objects) -> Truth:
    """(label, difficult, box) of each."""
    boxes = np.array([box for _, _, box in objects], np.float32).reshape(-1, 4)
    return Truth(boxes, np.array([c for c, _, _ in objects], int), np.array([d for _, d, _ in objects], bool))


LEFT, RIGHT = (0, 0, 10, 10), (20, 0, 30, 10)


def test_right_wrong_right():
    """Two objects: precision 1 at recall 1/2, then 1/2, then 2/3 at recall 1."""
    found = [detections((0.9, 1, LEFT), (0.8, 1, (50, 0, 60, 10)), (0.7, 1, RIGHT))]
    scores = voc_average_precision(found, [truth((1, False, LEFT), (1, False, RIGHT))], 1)
    # 0, 0.1, ..., 0.5 have precision 1, the other five 2/3.
    assert scores.eleven == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    assert scores.envelope == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))


def test_an_object_is_found_once_and_by_the_surest():
    found = [detections((0.5, 1, LEFT), (0.9, 1, (0, 0, 10, 8)))]
    assert voc_average_precision(found, [truth((1, False, LEFT))], 1).envelope == pytest.approx(100)
    # The second one comes before the other object's and is wrong: precision 1/2, then 2/3.
    found = [detections((0.9, 1, LEFT), (0.8, 1, LEFT), (0.7, 1, RIGHT))]
    scores = voc_average_precision(found, [truth((1, False, LEFT), (1, False, RIGHT))], 1)
    assert scores.envelope == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))


def test_the_object_that_is_overlapped_most_counts():
    """It has been found, and the one that is overlapped less stays unfound."""
    other = (0, 0, 10, 7)
    found = [detections((0.9, 1, LEFT), (0.8, 1, (0, 0, 10, 9.5)))]
    scores = voc_average_precision(found, [truth((1, False, LEFT), (1, False, other))], 1)
    assert scores.envelope == pytest.approx(50)


def test_difficult_objects_count_for_nothing():
    found = [detections((0.9, 1, RIGHT), (0.8, 1, RIGHT), (0.7, 1, LEFT))]
    scores = voc_average_precision(found, [truth((1, False, LEFT), (1, True, RIGHT))], 1)
    assert scores.eleven == pytest.approx(100)
    assert scores.envelope == pytest.approx(100)
    alone = voc_average_precision(found, [truth((1, True, RIGHT))], 1)
    assert np.isnan(alone.envelope).all()


def test_another_class_and_another_image_are_wrong():
    truths = [truth((1, False, LEFT)), truth((2, False, LEFT))]
    found = [detections((0.9, 2, LEFT)), detections((0.9, 1, LEFT))]
    assert voc_average_precision(found, truths, 2).envelope.tolist() == [0, 0]


def test_half_overlap_is_enough():
    """As many pixels as the development kit counts: (10 x 5) / (10 x 10)."""
    for bottom, expected in ((5, 100), (4.99, 0)):
        found = [detections((0.9, 1, (0, 0, 10, bottom)))]
        assert voc_average_precision(found, [truth((1, False, LEFT))], 1).envelope == expected


def test_nothing_found():
    assert voc_average_precision([detections()], [truth((1, False, LEFT))], 1).envelope.tolist() == [0]
    assert voc_average_precision([detections()], [truth()], 1).eleven.tolist() == pytest.approx([np.nan], nan_ok=True)


def slow(found, truths, label) -> tuple[float, float]:
    """One detection after the other in the words of VOCevaldet, and precision's maximum at every recall."""
    queue = [
        (float(score), number, box.tolist())
        for number, item in enumerate(found)
        for score, kind, box in zip(item.scores, item.labels, item.boxes, strict=True)
        if kind == label
    ]
    queue.sort(key=lambda entry: -entry[0])
    wanted = [
        [(box.tolist(), bool(hard)) for box, kind, hard in zip(*_columns(item), strict=True) if kind == label]
        for item in truths
    ]
    objects = sum(not hard for item in wanted for _, hard in item)
    detected = [[False] * len(item) for item in wanted]
    true = false = 0
    points = []
    for _, number, box in queue:
        best, place = -1.0, -1
        for candidate, (other, _) in enumerate(wanted[number]):
            width = min(box[2], other[2]) - max(box[0], other[0])
            height = min(box[3], other[3]) - max(box[1], other[1])
            if width > 0 and height > 0:
                area = (box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1])
                value = width * height / (area - width * height)
                if value > best:
                    best, place = value, candidate
        if best >= 0.5 and wanted[number][place][1]:
            continue
        if best >= 0.5 and not detected[number][place]:
            true, detected[number][place] = true + 1, True
        else:
            false += 1
        points.append((true, true / (true + false)))
    eleven = sum(max([p for hits, p in points if 10 * hits >= t * objects], default=0) for t in range(11)) / 11
    area = sum(max(p for hits, p in points if hits >= k) for k in range(1, true + 1)) / objects
    return 100 * eleven, 100 * area


def _columns(item: Truth):
    return item.boxes, item.labels, item.difficult


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_slow_version(seed):
    """Many of the detections are objects a little displaced, some twice, and others are anywhere."""
    rng = np.random.default_rng(seed)
    found, truths = [], []
    for _ in range(25):
        corners = rng.uniform(0, 60, (rng.integers(0, 6), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 30, corners.shape)], 1).astype(np.float32)
        labels = rng.integers(1, 4, len(boxes))
        truths.append(Truth(boxes, labels, rng.random(len(boxes)) < 0.25))
        twice = np.concatenate([boxes, boxes, np.float32(rng.uniform((0, 0, 30, 30), (30, 30, 60, 60), (3, 4)))])
        kinds = np.concatenate([labels, labels, rng.integers(1, 4, 3)])
        kept = rng.random(len(twice)) < 0.8
        moved = (twice + rng.uniform(-4, 4, twice.shape)).astype(np.float32)
        scores = rng.permutation(1000)[: len(twice)].astype(np.float32) + rng.random(len(twice), np.float32)
        found.append(Detections(moved[kept], scores[kept], kinds[kept]))
    scores = voc_average_precision(found, truths, 3)
    for label in (1, 2, 3):
        eleven, area = slow(found, truths, label)
        assert 10 < area < 90
        assert scores.eleven[label - 1] == pytest.approx(eleven, abs=1e-9)
        assert scores.envelope[label - 1] == pytest.approx(area, abs=1e-9)
