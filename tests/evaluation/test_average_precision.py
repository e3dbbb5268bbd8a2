"""Average precision by hand, against loops, and against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve

from pcl_fast.evaluation.average_precision import (
    eleven_point_ap,
    eleven_points,
    envelope_ap,
    envelope_area,
    precision_recall,
)


def ranked(*relevant: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores that fall, and which of the items are relevant."""
    return np.arange(len(relevant))[::-1].astype(float), np.array(relevant, bool)


@pytest.mark.parametrize(
    ("relevant", "envelope", "eleven"),
    [
        ((1, 1, 0, 0), 1, 1),
        # Precision 0, 1/2, 2/3, 1/2: the envelope is 2/3 at every recall.
        ((0, 1, 1, 0), 2 / 3, 2 / 3),
        # Precision 1, 1/2, 2/3: 1 up to the recall 1/2, 2/3 beyond; six points of eleven lie at 0.5 or below.
        ((1, 0, 1), (1 + 2 / 3) / 2, (6 + 5 * 2 / 3) / 11),
        ((0, 0, 0, 1), 1 / 4, 1 / 4),
    ],
)
def test_by_hand(relevant, envelope, eleven):
    assert envelope_ap(*ranked(*relevant)) == pytest.approx(envelope)
    assert eleven_point_ap(*ranked(*relevant)) == pytest.approx(eleven)


def test_a_recall_of_three_tenths_reaches_the_fourth_point():
    """Relevant items are three, all at the top, of ten, the rest of which is not ranked: 0, 0.1, 0.2 and 0.3."""
    precision, recall = precision_recall(*ranked(1, 1, 1, 0), total=10)
    assert recall.tolist() == [0.1, 0.2, 0.3, 0.3]
    assert eleven_points(precision, recall) == pytest.approx(4 / 11)
    assert envelope_area(precision, recall) == pytest.approx(0.3)


def test_nothing_is_ranked():
    curve = precision_recall(np.array([]), np.array([]), total=2)
    assert (envelope_area(*curve), eleven_points(*curve)) == (0, 0)


def test_equal_scores_enter_together():
    """So the order of the items does not matter: 1 of 2, then 2 of 3."""
    scores = np.array([2.0, 2.0, 1.0])
    for relevant in ([1, 0, 1], [0, 1, 1]):
        precision, recall = precision_recall(scores, relevant)
        assert precision.tolist() == [1 / 2, 2 / 3]
        assert recall.tolist() == [1 / 2, 1]
        assert envelope_ap(scores, relevant) == pytest.approx(2 / 3)


def test_ignored_items_are_as_if_they_were_not_there():
    scores, relevant = ranked(1, 0, 0, 1, 0)
    ignored = np.array([0, 1, 0, 0, 1], bool)
    assert envelope_ap(scores, relevant, ignored) == envelope_ap(*ranked(1, 0, 1))
    assert eleven_point_ap(scores, relevant, ignored) == eleven_point_ap(*ranked(1, 0, 1))
    assert envelope_ap(scores, relevant) < envelope_ap(scores, relevant, ignored)


def slow(scores, relevant) -> tuple[float, float]:
    """Both, with loops over the items; equal scores must not occur."""
    order = sorted(range(len(scores)), key=lambda item: -scores[item])
    points, found = [], 0
    for rank, item in enumerate(order, 1):
        found += bool(relevant[item])
        points.append((found / sum(map(bool, relevant)), found / rank))
    area, before = 0.0, 0.0
    for recall, _ in points:
        if recall != before:
            area += (recall - before) * max(precision for other, precision in points if other >= recall)
            before = recall
    eleven = [max(precision for recall, precision in points if 10 * recall >= tenths - 1e-6) for tenths in range(11)]
    return area, sum(eleven) / 11


@pytest.mark.parametrize("seed", range(4))
def test_equal_the_loops_and_exceed_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    relevant = rng.random(60) < 0.3
    scores = rng.standard_normal(60) + relevant
    assert (envelope_ap(scores, relevant), eleven_point_ap(scores, relevant)) == pytest.approx(slow(scores, relevant))
    assert envelope_ap(scores, relevant) > average_precision_score(relevant, scores)


def test_the_envelope_of_scikit_learn_s_curve_is_ours():
    """With ties; and without the envelope ours is scikit-learn's score."""
    rng = np.random.default_rng(0)
    relevant, scores = rng.random(200) < 0.3, rng.integers(0, 20, 200).astype(float)
    precision, recall, _ = precision_recall_curve(relevant, scores)
    assert envelope_ap(scores, relevant) == pytest.approx(envelope_area(precision[:-1][::-1], recall[:-1][::-1]))
    precision, recall = precision_recall(scores, relevant)
    assert np.sum(np.diff(recall, prepend=0) * precision) == pytest.approx(average_precision_score(relevant, scores))


@pytest.mark.parametrize("score", [envelope_ap, eleven_point_ap])
def test_what_has_no_average_precision(score):
    with pytest.raises(ValueError, match="not defined without a relevant item"):
        score(*ranked(0, 0))
    with pytest.raises(ValueError, match="not defined without a relevant item"):
        score(*ranked(1, 0), np.array([True, False]))
    with pytest.raises(ValueError, match="not numbers"):
        score(np.array([1.0, np.nan]), np.array([True, False]))
