"""Average precision of a ranking, in the two ways in which VOC has defined it."""

from __future__ import annotations

import numpy as np


def envelope_ap(scores: np.ndarray, relevant: np.ndarray, ignored: np.ndarray | None = None) -> float:
    """Return the average precision that VOC has since 2010: the area below the envelope of the precision.

    scikit-learn's average_precision_score is the area below the precision itself, at the same points. It is never more,
    and the same where the precision never rises from one point to the next.

    Args:
        scores: [n]; items of equal scores enter together, so that their order means nothing.
        relevant: bool [n].
        ignored: bool [n], items that are left out as if they were not there; None: no item is.

    Raises:
        ValueError: a score is not a number, or no item is relevant, so that there is no recall.
    """
    return envelope_area(*_curve(scores, relevant, ignored))


def eleven_point_ap(scores: np.ndarray, relevant: np.ndarray, ignored: np.ndarray | None = None) -> float:
    """Return the average precision that VOC had until 2009: the mean of the precision's envelope at eleven recalls.

    Arguments and errors are those of `envelope_ap`.
    """
    return eleven_points(*_curve(scores, relevant, ignored))


def precision_recall(
    scores: np.ndarray, relevant: np.ndarray, total: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision and recall, float64 [m] each, after every distinct score from the highest down.

    Args:
        scores: [n]; items of equal scores enter together, so that their order means nothing.
        relevant: bool [n].
        total: how many relevant items there are, if some are not ranked at all (objects that no box has found).

    Raises:
        ValueError: a score is not a number, or no item is relevant, so that there is no recall.
    """
    scores, relevant = np.asarray(scores, dtype=np.float64), np.asarray(relevant, dtype=bool)
    total = int(relevant.sum()) if total is None else total
    if total == 0:
        raise ValueError("average precision is not defined without a relevant item")
    if np.isnan(scores).any():
        raise ValueError("average precision is not defined for scores that are not numbers (NaN)")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)]  # of the items with its score
    found, taken = relevant[order].cumsum()[last], np.arange(1, len(ranked) + 1)[last]
    return found / taken, found / total


def envelope_area(precision: np.ndarray, recall: np.ndarray) -> float:
    """Return the area below the envelope, which is at every recall the best precision from there on.

    Args:
        precision, recall: [m] each, as `precision_recall` returns them: recall never falls.
    """
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * best).sum())


def eleven_points(precision: np.ndarray, recall: np.ndarray) -> float:
    """Return the mean of the envelope at the recalls 0, 0.1, ..., 1; it is 0 beyond the last recall.

    Args:
        precision, recall: [m] each, as `precision_recall` returns them.
    """
    # A recall of 3/10 must count as 0.3, whatever its last bits are.
    reached = [precision[recall >= point / 10 - 1e-9] for point in range(11)]
    return float(np.mean([values.max() if len(values) else 0.0 for values in reached]))


def _curve(scores: np.ndarray, relevant: np.ndarray, ignored: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    kept = slice(None) if ignored is None else ~np.asarray(ignored, dtype=bool)
    return precision_recall(np.asarray(scores)[kept], np.asarray(relevant)[kept])
