"""Average precision: by hand, against a slow version, and beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from pcl_fast.evaluation.average_precision import eleven_points, envelope_area, precision_recall


def curve(*relevant: int, total: int | None = None):
    return precision_recall(-np.arange(len(relevant)), np.array(relevant, dtype=bool), total)


def test_a_ranking_by_hand():
    """Recall 1/3 has at best precision 1, recall 2/3 and 1 have 3/5."""
    precision, recall = curve(1, 0, 0, 1, 1)
    assert precision.tolist() == [1, 1 / 2, 1 / 3, 2 / 4, 3 / 5]
    assert recall.tolist() == [1 / 3, 1 / 3, 1 / 3, 2 / 3, 1]
    assert envelope_area(precision, recall) == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)
    # The recalls 0, 0.1, 0.2 and 0.3 are reached at precision 1, the seven others at 3/5.
    assert eleven_points(precision, recall) == pytest.approx((4 * 1 + 7 * 3 / 5) / 11)


def test_relevant_items_that_are_never_ranked():
    precision, recall = curve(1, 1, total=4)
    assert envelope_area(precision, recall) == 0.5
    assert eleven_points(precision, recall) == pytest.approx(6 / 11)


def test_ends_of_the_range():
    for area in (envelope_area, eleven_points):
        assert area(*curve(1, 1, 0, 0)) == 1
        assert area(*curve(0, 0, 0, total=3)) == 0
    with pytest.raises(ValueError, match="not defined without a relevant item"):
        curve(0, 0)


def test_equal_scores_stay_in_the_given_order():
    assert precision_recall(np.zeros(3), np.array([False, True, True]))[0].tolist() == [0, 1 / 2, 2 / 3]


def test_a_recall_of_three_tenths_counts_as_such():
    """3/10 is not 0.3 in every arithmetic."""
    precision, recall = curve(1, 1, 1, total=10)
    assert eleven_points(precision, recall) == pytest.approx(4 / 11)


def slow(scores: list[float], relevant: list[bool]) -> tuple[float, float]:
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    points, hits = [], 0
    for rank, place in enumerate(order, 1):
        hits += relevant[place]
        points.append((hits / sum(relevant), hits / rank))
    area, last = 0.0, 0.0
    for number, (recall, _) in enumerate(points):
        area += (recall - last) * max(precision for _, precision in points[number:])
        last = recall
    eleven = 0.0
    for level in range(11):
        eleven += max([precision for recall, precision in points if recall * 10 >= level - 1e-8], default=0.0) / 11
    return area, eleven


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_slow_version_and_is_no_less_than_scikit_learn_s(seed):
    rng = np.random.default_rng(seed)
    relevant = rng.random(70) < 0.2 + 0.1 * seed
    scores = rng.normal(size=70) + relevant
    found = precision_recall(scores, relevant)
    areas = envelope_area(*found), eleven_points(*found)
    assert areas == pytest.approx(slow(scores.tolist(), relevant.tolist()))
    precision, recall = found
    steps = float((np.diff(recall, prepend=0) * precision).sum())  # without the envelope it is scikit-learn's
    assert steps == pytest.approx(average_precision_score(relevant, scores))
    assert areas[0] >= steps
