"""The SVMs of both protocols against slow transcriptions, and what is drawn."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from ranks import run_ranks
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from test_average_precision import slow

from pcl_fast.distributed import World
from pcl_fast.evaluation.average_precision import envelope_ap
from pcl_fast.evaluation.parallel import spread
from pcl_fast.evaluation.svm import (
    PROTOCOLS,
    VocFeatures,
    VocJob,
    choose_full,
    choose_low_shot,
    draw_labels,
    draw_voc,
    score_labels,
    score_voc,
    unit,
    voc_jobs,
)

CLASSES, SEED = 3, 5
PCL = PROTOCOLS["pcl"]
FAIR = replace(PROTOCOLS["fair"], costs=(1e-3, 0.1, 10.0))
PROTOCOL = pytest.mark.parametrize("protocol", [PCL, replace(PCL, costs=FAIR.costs), FAIR])
ALONE = World(0, 1, torch.device("cpu"), None)


def images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features to which a class adds its own direction, and presence; a tenth of what is there is difficult."""
    rng = np.random.default_rng(seed)
    presence = np.where(rng.random((n, CLASSES)) < 0.35, 1, -1).astype(np.int8)
    directions = np.random.default_rng(0).normal(size=(CLASSES, 10))
    features = rng.normal(size=(n, 10)) + (presence > 0) @ directions
    presence[(presence == 1) & (rng.random((n, CLASSES)) < 0.1)] = 0
    return unit(features.astype(np.float32)), presence


@pytest.fixture(scope="module")
def data() -> VocFeatures:
    return VocFeatures(*images(90, 1), *images(60, 2))


def svm(cost: float) -> LinearSVC:
    return LinearSVC(
        C=cost, class_weight={1: 2, -1: 1}, penalty="l2", loss="squared_hinge", tol=1e-4, dual=True, max_iter=2000,
        random_state=0,
    )  # fmt: skip


def slow_scores(data: VocFeatures, label: int, rows: list[int], cost: float, *, ignore: bool) -> tuple[float, float]:
    """Both average precisions of an SVM that learns from these images."""
    x = np.stack([data.train[row] for row in rows])
    y = [1 if data.train_presence[row, label] == 1 else -1 for row in rows]
    tested = [row for row in range(len(data.test)) if not (ignore and data.test_presence[row, label] == 0)]
    scores = svm(cost).fit(x, y).decision_function(np.stack([data.test[row] for row in tested]))
    return slow(scores.tolist(), [bool(data.test_presence[row, label] == 1) for row in tested])


def scored(data: VocFeatures, protocol, jobs: list[VocJob]) -> np.ndarray:
    return np.array([score_voc(data, protocol, SEED, job) for job in jobs])


@PROTOCOL
def test_few_images_equal_a_slow_version(data, protocol):
    """Three draws of 1 and of 2 images of a class; of several costs the one with the best mean is taken."""
    found = scored(data, protocol, voc_jobs(protocol, (1, 2), 3, CLASSES, full=False))
    for number, shots in enumerate((1, 2)):
        by_cost = []
        for cost in protocol.costs:
            areas = np.zeros((3, CLASSES, 2))
            for draw in range(3):
                for label in range(CLASSES):
                    rows = draw_voc(data.train_presence, protocol, SEED, VocJob(shots, draw, label, ())).tolist()
                    areas[draw, label] = slow_scores(data, label, rows, cost, ignore=protocol is FAIR)
            by_cost.append(areas)
        best = int(np.argmax([areas[:, :, 0].mean() for areas in by_cost]))
        part = found.reshape(2, 3, CLASSES, len(protocol.costs), 4)[number]
        chosen = choose_low_shot(part, protocol.costs)
        assert chosen.costs.tolist() == [protocol.costs[best]] * CLASSES
        assert chosen.envelope == pytest.approx(by_cost[best][..., 0])
        assert chosen.eleven == pytest.approx(by_cost[best][..., 1])


@PROTOCOL
def test_all_images_equal_a_slow_version(data, protocol):
    """fair chooses a cost for every class in three folds; pcl for all of them by the test images, if there are any."""
    areas = np.zeros((CLASSES, len(protocol.costs), 2))
    folds = np.zeros((CLASSES, len(protocol.costs)))
    for label in range(CLASSES):
        y = np.where(data.train_presence[:, label] == 1, 1, -1)
        for number, cost in enumerate(protocol.costs):
            areas[label, number] = slow_scores(data, label, list(range(90)), cost, ignore=protocol is FAIR)
            folds[label, number] = np.mean(
                [
                    average_precision_score(
                        y[held] == 1, svm(cost).fit(data.train[kept], y[kept]).decision_function(data.train[held])
                    )
                    for kept, held in StratifiedKFold(3).split(data.train, y)
                ]
            )
    best = folds.argmax(1) if protocol is FAIR else np.repeat(areas[..., 0].mean(0).argmax(), CLASSES)
    found = scored(data, protocol, voc_jobs(protocol, (), 3, CLASSES, full=True))
    chosen = choose_full(found.reshape(CLASSES, len(protocol.costs), 4), protocol.costs, protocol)
    assert chosen.costs.tolist() == [protocol.costs[number] for number in best]
    assert chosen.envelope[0] == pytest.approx(areas[range(CLASSES), best, 0])
    assert chosen.eleven[0] == pytest.approx(areas[range(CLASSES), best, 1])
    assert chosen.envelope.mean() > 0.6
    assert protocol is not FAIR or len(set(best)) > 1  # each class has its own


def test_pcl_draws_for_all_classes_together(data):
    """k images of each class, one after another, an image of two classes perhaps twice; or all that there are."""
    presence = data.train_presence
    drawn = [draw_voc(presence, PCL, SEED, VocJob(8, 0, label, ())) for label in range(CLASSES)]
    assert all(np.array_equal(rows, drawn[0]) for rows in drawn)
    for label, rows in enumerate(drawn[0].reshape(CLASSES, 8)):
        assert (presence[rows, label] == 1).all()
        assert len(set(rows.tolist())) == 8
    assert len(set(drawn[0].tolist())) < 24
    for other in (VocJob(8, 1, 0, ()), VocJob(9, 0, 0, ())):
        assert drawn[0][:8].tolist() != draw_voc(presence, PCL, SEED, other)[:8].tolist()
    assert drawn[0].tolist() != draw_voc(presence, PCL, SEED + 1, VocJob(8, 0, 0, ())).tolist()
    assert len(draw_voc(presence, PCL, SEED, VocJob(90, 0, 0, ()))) == (presence == 1).sum()


def test_fair_draws_for_every_class(data):
    """k images with it and, of three classes, 2 k without; none whose objects are difficult."""
    drawn = [draw_voc(data.train_presence, FAIR, SEED, VocJob(4, 0, label, ())) for label in range(CLASSES)]
    for label, rows in enumerate(drawn):
        assert data.train_presence[rows, label].tolist() == [1] * 4 + [-1] * 8
        assert len(set(rows.tolist())) == 12
    assert len({tuple(sorted(rows.tolist())) for rows in drawn}) == CLASSES


def test_the_benchmark_s_costs():
    costs = PROTOCOLS["fair"].costs
    assert len(costs) == 26
    assert costs[:10] == (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100)
    assert costs[10:] == tuple(0.5**power for power in range(4, 20))


def test_shuffled_labels_bring_chance(data):
    rng = np.random.default_rng(0)
    jobs = voc_jobs(PCL, (), 1, CLASSES, full=True)
    shuffled = [
        scored(data._replace(train_presence=rng.permutation(data.train_presence)), PCL, jobs)[:, 0, 1]
        for _ in range(40)
    ]
    chance = [[envelope_ap(rng.random(60), shown) for shown in (data.test_presence == 1).T] for _ in range(200)]
    assert np.mean(shuffled, axis=0) == pytest.approx(np.mean(chance, axis=0), abs=0.08)
    assert (scored(data, PCL, jobs)[:, 0, 1] > np.mean(chance, axis=0) + 0.2).all()


def test_an_svm_that_does_not_converge_is_counted(data, recwarn):
    job = VocJob(None, 0, 0, (1e-3, 1e6))
    assert [score.stopped for score in score_voc(data, PCL, SEED, job)] == [0, 1]
    assert not recwarn.list


def single_labels(n: int, seed: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels, directions = rng.integers(0, classes, n), 2 * np.random.default_rng(0).normal(size=(classes, 10))
    return unit((rng.normal(size=(n, 10)) + directions[labels]).astype(np.float32)), labels


def test_single_labels_equal_scikit_learn():
    (train, labels), (test, answers) = single_labels(100, 1), single_labels(70, 2)
    rows = draw_labels(labels, 3, SEED, 0)
    assert labels[rows].tolist() == np.repeat(range(5), 3).tolist()
    assert len(set(rows.tolist())) == 15
    assert rows.tolist() != draw_labels(labels, 3, SEED, 1).tolist()
    machine = LinearSVC(C=0.5, tol=1e-4, dual=True, max_iter=2000, random_state=0)
    expected = machine.fit([train[row] for row in rows], [labels[row] for row in rows]).score(test, answers)
    assert score_labels(train, test, answers, rows, labels[rows]) == (pytest.approx(expected), False)
    assert expected > 0.5
    rng = np.random.default_rng(0)
    shuffled = [score_labels(train, test, answers, rows, rng.permutation(labels[rows]))[0] for _ in range(40)]
    assert np.mean(shuffled) == pytest.approx(1 / 5, abs=0.08)


def on_ranks(world: World, data: VocFeatures, processes: int) -> tuple[list[int], list]:
    jobs = [(job,) for job in voc_jobs(FAIR, (1, 2), 2, CLASSES, full=True)]
    parts = list(spread(partial(score_voc, data, FAIR, SEED), jobs, processes=processes, world=world))
    return [len(part) for part in parts], [scores for part in parts for scores in part]


def test_ranks_find_the_same(data):
    lengths, found = on_ranks(ALONE, data, 1)
    assert lengths == [8, 8, 5]
    assert run_ranks(2, on_ranks, data, 1) == [([16, 5], found)] * 2


@pytest.mark.slow
def test_processes_find_the_same(data):
    """To the last bit, which threads would not: liblinear has one random generator for all of them."""
    assert on_ranks(ALONE, data, 2) == ([16, 5], on_ranks(ALONE, data, 1)[1])
