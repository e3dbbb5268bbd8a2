"""Linear SVMs on frozen features: on VOC's classes, of which an image can have several, and on single labels.

Two protocols are in use for VOC07. "pcl" is the official PCL code's, "fair" that of the FAIR self-supervision
benchmark, which moves scores of 1 and 2 images of a class by several points.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from pcl_fast.evaluation.average_precision import eleven_points, envelope_area, precision_recall

# The benchmark's costs: decades, and powers of one half.
FAIR_COSTS = (*(10.0**power for power in range(-7, 3)), *(0.5**power for power in range(4, 20)))
# Of VOC, where most images do not have a class.
_VOC_WEIGHTS = {1: 2, -1: 1}


class Precision(NamedTuple):
    """Mean average precision over the classes, in percent: by the envelope, and by eleven points."""

    envelope: float
    eleven: float


@dataclass(frozen=True)
class Presence:
    """Features of images, and which classes are on them.

    features: float32 [n, d], see `unit`.
    presence: int8 [n, C]: 1 the class is there, 0 all of its objects are difficult, -1 it is not.
    """

    features: np.ndarray
    presence: np.ndarray


@dataclass
class Workers:
    """Threads among which fits are divided; liblinear lets Python go while it works.

    jobs: number of threads.
    progress: is told how many fits are done.
    unconverged: how many fits have reached the most iterations.
    """

    jobs: int = os.cpu_count() or 1
    progress: Callable[[int], None] = lambda done: None
    unconverged: int = 0
    done: int = field(default=0, init=False)

    def fit(self, work: Sequence[tuple[np.ndarray, np.ndarray, float, dict | None]]) -> Iterator[LinearSVC]:
        """Yield a fitted SVM for every (features, labels, cost, class weights), in order."""
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
            pool = Parallel(self.jobs, backend="threading", return_as="generator")
            for machine in pool(delayed(_fit)(*item) for item in work):
                self.unconverged += machine.n_iter_ >= machine.max_iter
                self.done += 1
                self.progress(self.done)
                yield machine

    def map(self, function: Callable[..., Any], work: Sequence[tuple]) -> list[Any]:
        """Return function(*item) for every item, in order."""
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)
            return Parallel(self.jobs, backend="threading")(delayed(function)(*item) for item in work)


def unit(features: np.ndarray) -> np.ndarray:
    """Return x / (|x| + 1e-5) for every row x, as both protocols do."""
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def machine(cost: float, weights: dict[int, float] | None) -> LinearSVC:
    """Return the SVM of all protocols, not yet fitted."""
    return LinearSVC(C=cost, class_weight=weights, dual=True, tol=1e-4, max_iter=2000, random_state=0)


def _fit(features: np.ndarray, labels: np.ndarray, cost: float, weights: dict[int, float] | None) -> LinearSVC:
    return machine(cost, weights).fit(features, labels)


# --- VOC ----------------------------------------------------------------------------------------------------------


def voc_full(train: Presence, test: Presence, workers: Workers, *, fair: bool, costs: Sequence[float]) -> Precision:
    """Train an SVM for every class on all images.

    Args:
        fair: ignore difficult images instead of counting them as negatives.
        costs: C; of several the best in 3-fold cross-validation is taken, for every class alone.
    """
    parts = [_labelled(train, number, fair) for number in range(train.presence.shape[1])]
    chosen = [costs[0]] * len(parts) if len(costs) == 1 else _cross_validated(parts, costs, workers)
    machines = workers.fit([(*part, cost, _VOC_WEIGHTS) for part, cost in zip(parts, chosen, strict=True)])
    return _mean([_precision(found, test, number, fair) for number, found in enumerate(machines)])


def _cross_validated(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], costs: Sequence[float], workers: Workers
) -> list[float]:
    """Return for every class the cost with the best mean average precision in three folds."""
    work = [(features, labels, cost) for features, labels in parts for cost in costs]
    scores = np.array(workers.map(_fold_score, work)).reshape(len(parts), len(costs))
    return [costs[best] for best in scores.argmax(1)]


def _fold_score(features: np.ndarray, labels: np.ndarray, cost: float) -> float:
    return cross_val_score(machine(cost, _VOC_WEIGHTS), features, labels, cv=3, scoring="average_precision").mean()


def voc_low_shot(
    train: Presence,
    test: Presence,
    shots: int,
    workers: Workers,
    *,
    draws: int,
    seed: int,
    fair: bool,
    costs: Sequence[float],
) -> list[Precision]:
    """Train SVMs on few images of every class; return the scores of every draw.

    Args:
        shots: images of a class. "pcl" labels the union of all classes' images for all classes; fair gives every class
            its own images and 19 times as many without it, and ignores the rest.
        draws: how many times images are drawn.
        costs: C; of several the one with the best mean on the test images is taken, as the benchmark does.
    """
    drawn = [draw_voc(train.presence, shots, seed=seed, draw=draw, fair=fair) for draw in range(draws)]
    classes = train.presence.shape[1]
    work = [
        (train.features[rows], np.where(train.presence[rows, number] == 1, 1, -1), cost, _VOC_WEIGHTS)
        for cost in costs
        for sets in drawn
        for number, rows in enumerate(sets)
    ]
    places = [number for _ in costs for _ in drawn for number in range(classes)]
    scores = [_precision(found, test, number, fair) for number, found in zip(places, workers.fit(work), strict=True)]
    means = [_mean(scores[begin : begin + classes]) for begin in range(0, len(scores), classes)]
    by_cost = [means[begin : begin + draws] for begin in range(0, len(means), draws)]
    return max(by_cost, key=lambda found: np.mean([score.envelope for score in found]))


def draw_voc(presence: np.ndarray, shots: int, *, seed: int, draw: int, fair: bool) -> list[np.ndarray]:
    """Draw images for every class: positions int64, in rising order.

    Raises:
        ValueError: a class has none, or, if fair, fewer than `shots`.
    """
    rng = np.random.default_rng([seed, draw, shots])
    sets = []
    for number in range(presence.shape[1]):
        with_class = np.flatnonzero(presence[:, number] == 1)
        least = shots if fair else 1
        if len(with_class) < least:
            raise ValueError(f"class {number} has {len(with_class)} images, and {shots} are to be drawn")
        chosen = rng.permutation(with_class)[:shots]
        if fair:
            without = rng.permutation(np.flatnonzero(presence[:, number] == -1))[: 19 * shots]
            chosen = np.concatenate([chosen, without])
        sets.append(np.sort(chosen))
    return sets if fair else [np.unique(np.concatenate(sets))] * len(sets)


def _labelled(data: Presence, number: int, fair: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return features and labels 1 and -1 of a class."""
    rows = data.presence[:, number] != 0 if fair else slice(None)
    return data.features[rows], np.where(data.presence[rows, number] == 1, 1, -1)


def _precision(found: LinearSVC, test: Presence, number: int, fair: bool) -> Precision:
    features, labels = _labelled(test, number, fair)
    curve = precision_recall(found.decision_function(features), labels == 1)
    return Precision(100 * envelope_area(*curve), 100 * eleven_points(*curve))


def _mean(scores: Sequence[Precision]) -> Precision:
    return Precision(*np.mean(scores, axis=0).tolist())


# --- single labels ------------------------------------------------------------------------------------------------


def low_shot_accuracy(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    shots: int,
    workers: Workers,
    *,
    draws: int,
    seed: int,
) -> list[float]:
    """Train one multi-class SVM (C = 0.5) on few images of every class; return its accuracy on all test images, in
    percent, for every draw.

    Args:
        train, test: (features float32 [n, d], see `unit`; labels int64 [n]).
        shots: images of a class.
        draws: how many times images are drawn.

    Raises:
        ValueError: a class has fewer than `shots` training images.
    """
    features, labels = train
    drawn = [draw_labels(labels, shots, seed=seed, draw=draw) for draw in range(draws)]
    machines = workers.fit([(features[rows], labels[rows], 0.5, None) for rows in drawn])
    return [100 * float(found.score(*test)) for found in machines]


def draw_labels(labels: np.ndarray, shots: int, *, seed: int, draw: int) -> np.ndarray:
    """Draw `shots` images of every class: positions int64, in rising order.

    Raises:
        ValueError: a class has fewer.
    """
    rng = np.random.default_rng([seed, draw, shots])
    sets = []
    for number in np.unique(labels):
        of_class = np.flatnonzero(labels == number)
        if len(of_class) < shots:
            raise ValueError(f"class {number} has {len(of_class)} images, and {shots} are to be drawn")
        sets.append(rng.permutation(of_class)[:shots])
    return np.sort(np.concatenate(sets))
