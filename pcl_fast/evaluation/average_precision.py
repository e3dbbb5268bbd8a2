"""Average precision of a ranking, in the two ways in which VOC has defined it."""

from __future__ import annotations

import numpy as np


def precision_recall(
    scores: np.ndarray, relevant: np.ndarray, total: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision and recall, float64 [n] each, after every item from the highest score down.

    Args:
        scores: [n]; items of equal scores stay in the order in which they are given.
        relevant: bool [n].
        total: how many relevant items there are, if some are not ranked at all (objects that no box has found).

    Raises:
        ValueError: no item is relevant, so that there is no recall.
    """
    total = int(relevant.sum()) if total is None else total
    if total == 0:
        raise ValueError("average precision is not defined without a relevant item")
    found = relevant[np.argsort(-scores, kind="stable")].cumsum()
    return found / np.arange(1, len(scores) + 1), found / total


def envelope_area(precision: np.ndarray, recall: np.ndarray) -> float:
    """Return the area below the precision's envelope: at every recall the best precision from there on.

    It is VOC's own since 2010. scikit-learn's average_precision_score takes the precision itself, which is never more.
    """
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * best).sum())


def eleven_points(precision: np.ndarray, recall: np.ndarray) -> float:
    """Return the mean of the envelope at the recalls 0, 0.1, ..., 1 (VOC until 2009)."""
    # A recall of 3/10 must count as 0.3, whatever its last bits are.
    reached = [precision[recall >= point / 10 - 1e-9] for point in range(11)]
    return float(np.mean([values.max() if len(values) else 0.0 for values in reached]))
