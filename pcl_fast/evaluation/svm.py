"""Linear SVMs on frozen features: one for every class of VOC07, of which an image may hold several, and one for all
classes of images with a single label.

Two protocols are in use for VOC07, and scores of 1 and 2 images of a class differ by several points between them: "pcl"
is that of PCL's official script, "fair" that of the FAIR self-supervision benchmark.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from pcl_fast.evaluation.average_precision import eleven_points, envelope_area, precision_recall
from pcl_fast.seeds import Purpose, mix_seeds

# After so many liblinear gives up.
ITERATIONS = 2000
_COST = 0.5


@dataclass(frozen=True)
class Protocol:
    """How the SVMs of VOC07 are trained and tested.

    costs: every C that is tried.
    own_images: whether a class has low-shot images of its own, k that show it and 19 k that do not (for 20 classes).
        Otherwise all classes learn from k images of each. An image that is drawn for two classes is there twice.
    without_difficult: whether an image is left out of a class's test if all of its objects of the class are difficult;
        otherwise it does not show the class. In training on all images it never does.
    folds: how many folds of the training images a class tries the costs on when it trains on all; 0: the cost is the
        one with the best mean on the test images, as it is for few images.
    """

    costs: tuple[float, ...]
    own_images: bool = False
    without_difficult: bool = False
    folds: int = 0


PROTOCOLS = {
    "pcl": Protocol(costs=(_COST,)),
    "fair": Protocol(
        costs=(*(float(f"1e{power}") for power in range(-7, 3)), *(0.5**power for power in range(4, 20))),
        own_images=True,
        without_difficult=True,
        folds=3,
    ),
}


class VocFeatures(NamedTuple):
    """The features of images, and which classes they show.

    train, test: float32 [n, d], see `unit`.
    train_presence, test_presence: int8 [n, C], as in VocSplit.
    """

    train: np.ndarray
    train_presence: np.ndarray
    test: np.ndarray
    test_presence: np.ndarray


class VocJob(NamedTuple):
    """A class's SVMs on the same images, one for each of some costs.

    shots: images of a class; None for all.
    draw: which of several draws of these.
    label: the class.
    """

    shots: int | None
    draw: int
    label: int
    costs: tuple[float, ...]


class Scored(NamedTuple):
    """What one SVM has reached.

    validation: mean of scikit-learn's average precision over the folds; 0 if there are none.
    envelope, eleven: average precision on the test images, see `average_precision`.
    stopped: 1 if liblinear gave up before it converged, else 0.
    """

    validation: float
    envelope: float
    eleven: float
    stopped: float


class Chosen(NamedTuple):
    """Scores with the chosen cost.

    costs: of every class, float64 [C].
    envelope, eleven: of every draw and class, float64 [draws, C].
    """

    costs: np.ndarray
    envelope: np.ndarray
    eleven: np.ndarray


def unit(features: np.ndarray) -> np.ndarray:
    """Return x / (|x| + 1e-5) for every row x of float32 [n, d], as all protocols do."""
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + np.float32(1e-5))


def voc_jobs(protocol: Protocol, shots: Sequence[int], draws: int, classes: int, *, full: bool) -> list[VocJob]:
    """List what is to be trained: for few images, in the order of `shots`, then for all images if `full`."""
    low_shot = [VocJob(*of, protocol.costs) for of in product(shots, range(draws), range(classes))]
    # One by one, for each takes as long as many of the others.
    whole = [VocJob(None, 0, label, (cost,)) for label in range(classes) for cost in protocol.costs]
    return [*low_shot, *(whole if full else [])]


def draw_voc(presence: np.ndarray, protocol: Protocol, seed: int, job: VocJob) -> np.ndarray:
    """Return which images a job learns from: positions int64. The same job always draws the same.

    Args:
        presence: int8 [n, C], as in VocSplit.
        seed: of the draws.

    Raises:
        ValueError: the class has too few images for `protocol.own_images`. Otherwise it gives all that it has.
    """
    if job.shots is None:
        return np.arange(len(presence))
    if not protocol.own_images:
        rng = np.random.default_rng(mix_seeds(seed, Purpose.EVALUATION, job.shots, job.draw))
        return np.concatenate([rng.permutation(np.flatnonzero(shown))[: job.shots] for shown in (presence == 1).T])
    rng = np.random.default_rng(mix_seeds(seed, Purpose.EVALUATION, job.shots, job.draw, job.label))
    column, others = presence[:, job.label], (presence.shape[1] - 1) * job.shots
    drawn = ((1, job.shots), (-1, others))
    return np.concatenate([rng.choice(np.flatnonzero(column == kind), k, replace=False) for kind, k in drawn])


def score_voc(data: VocFeatures, protocol: Protocol, seed: int, job: VocJob) -> list[Scored]:
    """Train and test the SVMs of a job, one after another.

    They are scikit-learn's LinearSVC (dual, l2, squared hinge, tolerance 1e-4, random state 0), in which images that
    show the class weigh twice as much as others.

    Args:
        seed: of what is drawn, see `draw_voc`.
    """
    rows = draw_voc(data.train_presence, protocol, seed, job)
    features, labels = data.train[rows].astype(np.float64), np.where(data.train_presence[rows, job.label] == 1, 1, -1)
    machines = [_svm(cost, {1: 2, -1: 1}) for cost in job.costs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
        validation = [
            _cross_validate(machine, features, labels, protocol.folds if job.shots is None else 0)
            for machine in machines
        ]
        for machine in machines:
            machine.fit(features, labels)
    # One pass over the test images for all costs.
    weights = np.concatenate([machine.coef_ for machine in machines]).astype(np.float32)
    scores = data.test @ weights.T + np.concatenate([machine.intercept_ for machine in machines])
    presence = data.test_presence[:, job.label]
    kept = presence != 0 if protocol.without_difficult else np.full(len(presence), True)
    curves = [precision_recall(column[kept], presence[kept] == 1) for column in scores.T]
    return [
        Scored(value, envelope_area(*curve), eleven_points(*curve), float(machine.n_iter_ >= ITERATIONS))
        for value, curve, machine in zip(validation, curves, machines, strict=True)
    ]


def choose_low_shot(scored: np.ndarray, costs: Sequence[float]) -> Chosen:
    """Take the cost with the best mean over all draws and classes on the test images.

    Args:
        scored: [draws, C, costs, 4], `Scored` of one number of images.
    """
    best = Scored(*np.moveaxis(scored, -1, 0)).envelope.mean((0, 1)).argmax()
    _, envelope, eleven, _ = np.moveaxis(scored[:, :, best], -1, 0)
    return Chosen(np.full(scored.shape[1], costs[best]), envelope, eleven)


def choose_full(scored: np.ndarray, costs: Sequence[float], protocol: Protocol) -> Chosen:
    """Take for every class the cost with the best validation; without folds as `choose_low_shot` does.

    Args:
        scored: [C, costs, 4], `Scored` of all images.
    """
    if not protocol.folds:
        return choose_low_shot(scored[None], costs)
    best = scored[:, :, 0].argmax(1)
    _, envelope, eleven, _ = scored[np.arange(len(best)), best].T
    return Chosen(np.asarray(costs)[best], envelope[None], eleven[None])


def draw_labels(labels: np.ndarray, shots: int, seed: int, draw: int) -> np.ndarray:
    """Draw `shots` images of every class: positions int64, class by class.

    Raises:
        ValueError: a class has fewer.
    """
    rng = np.random.default_rng(mix_seeds(seed, Purpose.EVALUATION, shots, draw))
    groups = np.split(np.argsort(labels, kind="stable"), np.bincount(labels).cumsum()[:-1])
    return np.concatenate([rng.choice(group, shots, replace=False) for group in groups])


def score_labels(
    train: np.ndarray, test: np.ndarray, answers: np.ndarray, rows: np.ndarray, labels: np.ndarray
) -> tuple[float, bool]:
    """Train one LinearSVC (C = 0.5, all images weigh the same) for all classes.

    Args:
        train, test: float32 [n, d], see `unit`.
        answers: int64, classes of the test images.
        rows: int64 [m], which of the training images are learned from.
        labels: int64 [m], their classes.

    Returns:
        (share of the test images that it classifies correctly, whether liblinear gave up before it converged)
    """
    machine = _svm(_COST, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        machine.fit(train[rows], labels)
    return float(np.mean(machine.predict(test) == answers)), bool(machine.n_iter_ >= ITERATIONS)


def _svm(cost: float, weights: dict[int, float] | None) -> LinearSVC:
    return LinearSVC(C=cost, class_weight=weights, dual=True, tol=1e-4, max_iter=ITERATIONS, random_state=0)


def _cross_validate(machine: LinearSVC, features: np.ndarray, labels: np.ndarray, folds: int) -> float:
    if not folds:
        return 0.0
    return float(cross_val_score(machine, features, labels, cv=folds, scoring="average_precision").mean())
