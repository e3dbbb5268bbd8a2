"""SVMs by both protocols, each against a slow transcription; what is drawn; the command on small sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from test_average_precision import slow
from test_command import run, run_folder  # noqa: F401  a fixture
from voc_sets import write_voc

from pcl_fast.data.sources.voc import VOC_CLASSES
from pcl_fast.evaluation.svm import (
    Presence,
    Workers,
    draw_labels,
    draw_voc,
    low_shot_accuracy,
    unit,
    voc_full,
    voc_low_shot,
)

COSTS = (0.5, 0.01)


def images(n: int, seed: int, classes: int = 3) -> Presence:
    """Features in which a class adds its own direction; a tenth of what is there is difficult."""
    rng = np.random.default_rng(seed)
    presence = np.where(rng.random((n, classes)) < 0.35, 1, -1).astype(np.int8)
    directions = np.random.default_rng(0).normal(size=(classes, 10))
    features = rng.normal(size=(n, 10)) + (presence > 0) @ directions
    presence[(presence == 1) & (rng.random((n, classes)) < 0.1)] = 0
    return Presence(unit(features.astype(np.float32)), presence)


def svm(cost: float) -> LinearSVC:
    return LinearSVC(
        C=cost, class_weight={1: 2, -1: 1}, penalty="l2", loss="squared_hinge", tol=1e-4, dual=True, max_iter=2000,
        random_state=0,
    )  # fmt: skip


def slow_class(train: Presence, test: Presence, number: int, rows, *, fair: bool, cost: float) -> tuple[float, float]:
    x = np.stack([train.features[row] for row in rows])
    y = [1 if train.presence[row, number] == 1 else -1 for row in rows]
    tested = [row for row in range(len(test.features)) if not fair or test.presence[row, number] != 0]
    scores = svm(cost).fit(x, y).decision_function(np.stack([test.features[row] for row in tested]))
    return slow(scores.tolist(), [bool(test.presence[row, number] == 1) for row in tested])


@pytest.mark.parametrize("fair", [False, True])
def test_all_images_equal_a_slow_version(fair):
    train, test = images(80, 1), images(60, 2)
    found = voc_full(train, test, Workers(2), fair=fair, costs=(0.5,))
    areas = []
    for number in range(3):
        rows = [row for row in range(80) if not fair or train.presence[row, number] != 0]
        areas.append(slow_class(train, test, number, rows, fair=fair, cost=0.5))
    assert found == pytest.approx(100 * np.mean(areas, axis=0))
    assert 55 < found.envelope < 99


def test_the_cost_is_chosen_for_each_class_in_three_folds():
    train, test, costs = images(90, 1), images(60, 2), (1e-3, 0.1, 10.0)
    areas, chosen = [], []
    for number in range(3):
        rows = np.array([row for row in range(90) if train.presence[row, number] != 0])
        x, y = train.features[rows], np.where(train.presence[rows, number] == 1, 1, -1)
        means = []
        for cost in costs:
            parts = StratifiedKFold(3).split(x, y)
            scores = [
                average_precision_score(y[held] == 1, svm(cost).fit(x[kept], y[kept]).decision_function(x[held]))
                for kept, held in parts
            ]
            means.append(np.mean(scores))
        chosen.append(costs[int(np.argmax(means))])
        areas.append(slow_class(train, test, number, rows.tolist(), fair=True, cost=chosen[-1]))
    assert voc_full(train, test, Workers(2), fair=True, costs=costs) == pytest.approx(100 * np.mean(areas, axis=0))
    assert len(set(chosen)) > 1  # each class has its own


@pytest.mark.parametrize("fair", [False, True])
def test_few_images_equal_a_slow_version(fair):
    train, test = images(80, 1), images(60, 2)
    costs = COSTS if fair else COSTS[:1]
    found = voc_low_shot(train, test, 4, Workers(2), draws=3, seed=5, fair=fair, costs=costs)
    by_cost = []
    for cost in costs:
        means = []
        for draw in range(3):
            sets = draw_voc(train.presence, 4, seed=5, draw=draw, fair=fair)
            areas = [
                slow_class(train, test, number, rows.tolist(), fair=fair, cost=cost) for number, rows in enumerate(sets)
            ]
            means.append(100 * np.mean(areas, axis=0))
        by_cost.append(means)
    expected = max(by_cost, key=lambda means: sum(mean[0] for mean in means))
    assert [pair for score in found for pair in score] == pytest.approx(np.concatenate(expected).tolist())


def test_the_official_protocol_draws_a_union():
    presence = images(200, 3).presence
    first, *others = draw_voc(presence, 4, seed=0, draw=0, fair=False)
    assert all(np.array_equal(first, other) for other in others)
    assert ((presence[first] == 1).sum(0) >= 4).all()
    assert len(first) <= 12
    again, another = (draw_voc(presence, 4, seed=0, draw=draw, fair=False)[0] for draw in (0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, another)


def test_the_fair_protocol_draws_for_every_class():
    presence = images(400, 3).presence
    for number, rows in enumerate(draw_voc(presence, 2, seed=0, draw=0, fair=True)):
        assert (presence[rows, number] == 1).sum() == 2
        assert (presence[rows, number] == -1).sum() == 38
        assert len(set(rows.tolist())) == 40


def test_few_images_of_single_labels_equal_a_slow_version():
    rng = np.random.default_rng(0)
    labels, tested = rng.integers(0, 5, 100), rng.integers(0, 5, 70)
    directions = 2 * rng.normal(size=(5, 10))
    train, test = (unit(rng.normal(size=(len(y), 10)) + directions[y]) for y in (labels, tested))
    found = low_shot_accuracy((train, labels), (test, tested), 3, Workers(2), draws=2, seed=1)
    for draw in range(2):
        rows = draw_labels(labels, 3, seed=1, draw=draw)
        assert np.bincount(labels[rows]).tolist() == [3] * 5
        classifier = LinearSVC(C=0.5, tol=1e-4, dual=True, max_iter=2000, random_state=0).fit(train[rows], labels[rows])
        assert found[draw] == 100 * np.mean(classifier.predict(test) == tested)
    assert min(found) > 40
    shuffled = [
        low_shot_accuracy((train, rng.permutation(labels)), (test, tested), 10, Workers(2), draws=1, seed=1)
        for _ in range(40)
    ]
    assert abs(np.mean(shuffled) - 20) < 8


def test_fits_at_their_limit_are_counted():
    rng = np.random.default_rng(0)
    workers = Workers(1)
    hard = 100 * rng.normal(size=(200, 30)), rng.integers(0, 2, 200), 1e6, None
    easy = np.array([[-1.0], [1.0]]), np.array([0, 1]), 0.5, None
    assert len(list(workers.fit([hard, easy]))) == 2
    assert (workers.unconverged, workers.done) == (1, 2)


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    """Every image has two of the classes, the second of which is difficult in one of three."""
    splits = {}
    for split, first in (("trainval", 0), ("test", 100)):
        splits[split] = {
            f"{first + number:06d}": [
                (VOC_CLASSES[number % 20], (3, 3, 22, 36), False),
                (VOC_CLASSES[(number * 7 + 3) % 20], (26, 5, 46, 30), number % 3 == 0),
            ]
            for number in range(60)
        }
    return write_voc(tmp_path_factory.mktemp("voc"), 2007, splits)


def test_the_command_on_voc(devkit, run_folder, tmp_path, capsys):  # noqa: F811
    arguments = ("svm", run_folder, "--data", devkit, "--output", tmp_path, "--shots", 1, 2, "--draws", 2)
    assert run(*arguments) is None
    printed = capsys.readouterr().out
    assert "60 trainval and 60 test images of VOC07" in printed
    assert "difficult objects are negatives" in printed
    found = json.loads((tmp_path / "svm.json").read_text())
    assert found["checkpoint"]["encoder"] == "query"
    assert [row["name"] for row in found["scores"]] == [
        "mAP, envelope", "its deviation over the draws", "mAP, 11 points",
    ]  # fmt: skip
    assert found["scores"][0]["full"] > found["scores"][0]["1"] > 0
    assert found["scores"][1]["full"] is None
    published = {row["name"]: row for row in found["paper"]}
    assert published["PCL v1"] == {"name": "PCL v1", "1": 46.9, "2": 56.4, "full": 82.3}
    assert "SVMs stopped" not in printed


def test_features_of_two_by_two_places_want_large_images(devkit, run_folder, tmp_path):  # noqa: F811
    text = run("svm", run_folder, "--data", devkit, "--output", tmp_path, "--shots", 1, "--protocol", "fair")
    assert "the protocol fair wants feature maps of 7 x 7, and images of 20 px give 5 x 5; use --size 224" in text


def test_the_command_on_folders(run_folder, tmp_path):  # noqa: F811
    for part in ("train", "val"):
        write_images(tmp_path / part)
    out = tmp_path / "out"
    assert run("svm", run_folder, "--data", tmp_path, "--output", out, "--shots", 1, 16, "--draws", 2) is None
    found = json.loads((out / "svm.json").read_text())
    assert found["scores"][0]["16"] > 50
    assert found["paper"] == []
    text = run("svm", run_folder, "--data", tmp_path, "--output", out, "--shots", 18)
    assert "--shots 18: class 2 has 17 images, and 18 are to be drawn (class_2); use smaller numbers" in text
    assert "--shots must be positive, got (0, 2)" in run("svm", run_folder, "--data", tmp_path, "--shots", 0, 2)
