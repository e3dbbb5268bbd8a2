"""Ross's estimate against a literal version and scikit-learn's, and the curves over a run's epochs."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from class_folders import write_images
from launches import evaluate as run
from ranks import run_ranks
from rich.console import Console
from saved_runs import ALONE, save_run
from scipy.special import digamma
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import mutual_info_score

from pcl_fast import evaluate
from pcl_fast.data import find_images
from pcl_fast.evaluation.features import encode_set
from pcl_fast.evaluation.mutual_information import cluster_information, feature_information
from pcl_fast.evaluation.tasks.mutual_information import MutualInformation
from pcl_fast.pretrained import read_pretrained
from pcl_fast.run.checkpoint import kept_checkpoints


def case(n: int = 150, classes: int = 6, d: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes of very unequal sizes, of which the last have one, two and three images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.randint(classes - 3, (n - 6,), generator=generator), torch.tensor([3, 4, 4, 5, 5, 5])])
    labels = labels[torch.randperm(n, generator=generator)]
    middles = 2 * torch.randn(classes, d, generator=generator)
    return middles[labels] + torch.randn(n, d, generator=generator), labels


def slow(column: list[float], labels: list[int], neighbours: int) -> float:
    """Ross's equation, point by point."""
    counts = {label: labels.count(label) for label in labels}
    points = [(x, label) for x, label in zip(column, labels, strict=True) if counts[label] > 1]
    total = 0.0
    for i, (x, label) in enumerate(points):
        own = sorted(abs(x - y) for j, (y, other) in enumerate(points) if j != i and other == label)
        k = min(neighbours, len(own))
        nearer = sum(abs(x - y) < own[k - 1] for y, _ in points)
        total += digamma(k) - digamma(counts[label]) - digamma(nearer)
    return max(0.0, digamma(len(points)) + total / len(points))


@pytest.mark.parametrize("neighbours", [1, 3, 10])
def test_equals_the_slow_version_and_scikit_learn(neighbours):
    features, labels = case()
    ours = feature_information(features, labels, neighbours=neighbours)
    expected = [slow(column.tolist(), labels.tolist(), neighbours) for column in features.double().T]
    assert ours.tolist() == pytest.approx(expected, abs=1e-12)
    assert min(expected) > 0.05
    # In small classes scikit-learn takes distances from |x|^2 + |y|^2 - 2xy, and miscounts neighbours now and then.
    large = labels < 3
    ours = feature_information(features[large], labels[large], neighbours=neighbours)
    x, y = features[large].double().numpy(), labels[large].numpy()
    theirs = mutual_info_classif(x, y, n_neighbors=neighbours, random_state=0)
    assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-12)


def test_columns_and_images_in_any_order(monkeypatch):
    """In one chunk or several, and whatever numbers the classes have."""
    features, labels = case()
    whole = feature_information(features, labels)
    monkeypatch.setattr("pcl_fast.evaluation.mutual_information._CHUNK", 1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    other = feature_information(features[order].flip(1), 7 * labels[order] - 3)
    torch.testing.assert_close(other.flip(0), whole)


def test_ties_are_broken():
    """Features that take few values, as prototypes do, or one."""
    labels = torch.arange(400) % 4
    clusters = (labels + (torch.arange(400) % 5 == 0)) % 4
    values = torch.tensor([0.3, -0.2, 0.5, 0.1])[clusters]
    features = torch.stack([values, torch.full((400,), 0.25)], dim=1)
    ours = feature_information(features, labels)
    theirs = mutual_info_classif(features.double().numpy(), labels.numpy(), random_state=1)
    assert ours.tolist() == pytest.approx(theirs.tolist(), abs=0.06)
    assert ours[0] == pytest.approx(cluster_information(clusters, labels), abs=0.06)
    assert ours[1] < 0.06


def test_nothing_and_everything():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (1000,), generator=generator)
    noise = torch.randn(1000, 8, generator=generator)
    assert feature_information(noise, labels).mean() < 0.03
    told = feature_information(labels[:, None] + 1e-3 * noise, labels)
    entropy = -sum(share * math.log(share) for share in (labels.bincount() / 1000).tolist())
    assert told.tolist() == pytest.approx([entropy] * 8, abs=0.01)
    assert cluster_information(labels, labels) == pytest.approx(entropy)
    assert cluster_information(torch.randint(4, (1000,), generator=generator), labels) < 0.02


def test_classes_of_one_image_are_refused():
    with pytest.raises(ValueError, match="classes of at least two images, every class has one"):
        feature_information(torch.randn(5, 2), torch.arange(5))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs of three checkpoints: PCL, whose first has no prototypes yet, and MoCo."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "pcl", 53)
    save_run(folder / "moco", 53, ks=())
    return folder


def scores(folder: Path) -> dict[str, dict[str, float]]:
    content = json.loads((folder / "mutual-information.json").read_text())
    return {row.pop("name"): row for row in content["scores"]}


def test_two_runs_in_one_table(images, runs, tmp_path):
    arguments = ("--data", images, "--output", tmp_path, "--images", 40, "--workers", 0)
    assert run("mutual-information", runs / "pcl", "--against", runs / "moco", *arguments) is None
    found = scores(tmp_path)
    assert list(found) == [f"{name}, epoch {epoch}" for name in ("pcl", "moco") for epoch in (1, 2, 3)]
    assert (tmp_path / "mutual-information.png").read_bytes().startswith(b"\x89PNG")
    assert all(list(row) == ["instance features", "prototypes", "cluster ids (k = 3)"] for row in found.values())
    assert found["pcl, epoch 2"] != found["pcl, epoch 3"]


def test_scores_are_of_the_checkpoint_s_own_prototypes(images, runs, tmp_path):
    """All images, so that scikit-learn can have the same."""
    arguments = ("--data", images, "--output", tmp_path, "--k", 5, "--workers", 0)
    assert run("mutual-information", runs / "pcl", *arguments) is None
    found = scores(tmp_path)
    for epoch, file in zip((1, 2, 3), kept_checkpoints(runs / "pcl"), strict=True):
        pretrained = read_pretrained(file, "momentum")
        data, folder = pretrained.data, find_images(images)
        features = encode_set(pretrained, folder, data, ALONE).head.numpy().astype(np.float64)
        row = list(found[f"pcl, epoch {epoch}"].values())
        expected = mutual_info_classif(features, folder.labels, random_state=0).mean()
        assert row[0] == pytest.approx(expected, abs=1e-6)
        if epoch == 1:
            assert not pretrained.prototypes
            continue
        centroids = pretrained.prototypes[1].centroids
        nearest = (features @ centroids.numpy().T).argmax(1)
        # Ties are broken by the same noise here as there.
        expected = feature_information(centroids[nearest], torch.tensor(folder.labels)).mean()
        assert row[1] == pytest.approx(float(expected))
        assert row[2] == pytest.approx(mutual_info_score(nearest, folder.labels))


def run_task(world, task) -> None:
    evaluate._run(task, world, Console(quiet=True))


def test_two_ranks_equal_one(images, runs, tmp_path):
    """With prototypes and with k-means; the chosen images are spread unevenly over the ranks."""
    for size, ranks in (
        ("one", lambda task: run_task(ALONE, task)),
        ("two", lambda task: run_ranks(2, run_task, task)),
    ):
        output = tmp_path / size
        ranks(MutualInformation(checkpoint=runs / "pcl", data=images, output=output, images=30, workers=0))
    one, two = scores(tmp_path / "one"), scores(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, row in one.items():
        assert list(two[name].values()) == pytest.approx(list(row.values()), abs=0.05)


def test_a_signal_stops_between_checkpoints(images, runs, tmp_path, capsys, monkeypatch):
    measured = []
    measure = MutualInformation._measure

    def signalling(self, *arguments):
        measured.append(arguments[-1].pretrained.path.name)
        if len(measured) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, *arguments)

    monkeypatch.setattr(MutualInformation, "_measure", signalling)
    arguments = ("mutual-information", runs / "pcl", "--data", images, "--output", tmp_path, "--workers", 0)
    assert run(*arguments) is None
    assert "stopped by a signal" in capsys.readouterr().out
    assert run(*arguments) is None
    assert measured == ["checkpoint-0001.pt", "checkpoint-0002.pt", "checkpoint.pt"]
    assert len(scores(tmp_path)) == 3


def test_bad_input(images, runs, tmp_path):
    command = ("mutual-information", runs / "pcl", "--data", images, "--output", tmp_path)
    assert "--k must be positive, got 0" in run(*command, "--k", 0)
    assert "--images must be at least 2, got 1" in run(*command, "--images", 1)
    assert "cannot make 54 clusters of 53 images; use a smaller --k" in run(*command, "--k", 54)
    assert "nowhere holds no checkpoint" in run(*command, "--against", tmp_path / "nowhere")


def test_what_evaluate_all_needs(images, runs, tmp_path):
    assert MutualInformation.obstacle(images, runs / "pcl") is None
    assert MutualInformation.obstacle(tmp_path, runs / "pcl") == f"{tmp_path} has no class folders"
    shutil.copy(runs / "pcl" / "checkpoint.pt", tmp_path)
    for alone in (tmp_path, tmp_path / "checkpoint.pt"):
        reason = f"{alone} is not the folder of a run that has kept checkpoints"
        assert MutualInformation.obstacle(images, alone) == reason


def test_of_two_checkpoints_of_an_epoch_the_last_counts(images, runs, tmp_path):
    """As at the end of a run."""
    copied = shutil.copytree(runs / "pcl", tmp_path / "pcl")
    shutil.copy(copied / "checkpoint.pt", copied / "checkpoint-0003.pt")
    (copied / "checkpoint-0003.pt.0f.tmp").touch()
    names = ["checkpoint-0001.pt", "checkpoint-0002.pt", "checkpoint-0003.pt", "checkpoint.pt"]
    assert [file.name for file in kept_checkpoints(copied)] == names
    assert run("mutual-information", copied, "--data", images, "--k", 3, "--workers", 0) is None
    rows = json.loads((copied / "evaluation" / "mutual-information.json").read_text())["scores"]
    assert [row["name"] for row in rows] == [f"pcl, epoch {epoch}" for epoch in (1, 2, 3)]


def test_features_of_unit_length_and_the_default_k(images, runs):
    """Runs without prototypes get a cluster for every 50 images."""
    task = MutualInformation(checkpoint=runs / "moco", data=images)
    moco, pcl = (read_pretrained(runs / name, "momentum") for name in ("moco", "pcl"))
    assert task._clusters([moco], 5000) == 100
    assert task._clusters([moco, pcl], 5000) == 3
    features = encode_set(moco, find_images(images), moco.data, ALONE)
    torch.testing.assert_close(features.unit("backbone"), F.normalize(features.backbone, dim=1))
    assert features.unit() is features.head
