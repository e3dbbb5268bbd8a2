"""The map's numbers against slow versions and scikit-learn's, and maps side by side."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from class_folders import write_images
from launches import evaluate as run
from ranks import run_ranks
from rich.console import Console
from saved_runs import ALONE, save_run
from sklearn.manifold import trustworthiness as theirs
from threadpoolctl import threadpool_limits

from pcl_fast import evaluate
from pcl_fast.evaluation import tsne as module
from pcl_fast.evaluation.tasks.map import Map
from pcl_fast.evaluation.tsne import embed, map_neighbours, neighbour_accuracy, trustworthiness


def blobs(n: int = 90, d: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of three classes far from one another."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    middles = torch.randn(3, d, generator=generator)
    return F.normalize(middles[labels] + 0.3 * torch.randn(n, d, generator=generator), dim=1), labels


def embed_quickly(features: np.ndarray, **options) -> np.ndarray:
    """With a quarter of the iterations, on one thread: for so few points, threads spend their time on waiting."""
    with threadpool_limits(1):
        return embed(features, iterations=250, **options)


def test_a_map_keeps_classes_together():
    features, labels = blobs()
    points = embed_quickly(features.numpy(), perplexity=10, seed=1)
    assert points.shape == (90, 2)
    assert points.dtype == np.float32
    near = map_neighbours(points, 4)
    assert neighbour_accuracy(near, labels) > 0.9
    assert trustworthiness(features, near) > 0.8
    shuffled = labels[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    assert neighbour_accuracy(near, shuffled) < 0.5
    assert np.array_equal(points, embed_quickly(features.numpy(), perplexity=10, seed=1))


def test_neighbours_one_by_one():
    points = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    labels = torch.arange(20) % 3
    near = map_neighbours(points, 3)
    right = 0
    for i, point in enumerate(points):
        order = np.argsort(((points - point) ** 2).sum(1))
        assert near[i].tolist() == [j for j in order.tolist() if j != i][:3]
        right += int(labels[near[i, 0]] == labels[i])
    assert neighbour_accuracy(near, labels) == right / 20


@pytest.mark.parametrize("chunk", [1 << 26, 400])
def test_trustworthiness_is_scikit_learn_s(chunk, monkeypatch):
    """Of a map that has little to do with the features; all at once, or some rows at a time."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    features, _ = blobs()
    points = features[:, :2].numpy() + 0.1 * np.random.default_rng(0).standard_normal((90, 2))
    found = trustworthiness(features.double(), map_neighbours(points, 5))
    assert found == pytest.approx(theirs(features.double().numpy(), points, n_neighbors=5))
    assert 0.5 < found < 0.95


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "pcl", 53, epochs=2)


def scores(folder: Path) -> dict[str, list[float]]:
    content = json.loads((folder / "map.json").read_text())
    return {row.pop("name"): list(row.values()) for row in content["scores"]}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("pcl_fast.evaluation.tasks.map.embed", embed_quickly)


def test_maps_side_by_side(images, run_folder, tmp_path, capsys, quick):
    arguments = ("--data", images, "--output", tmp_path, "--perplexity", 5, "--workers", 0)
    others = (run_folder / "checkpoint.pt", run_folder / "checkpoint-0001.pt")
    assert run("map", run_folder, "--beside", *others, *arguments) is None
    found = scores(tmp_path)
    # The last parts of these paths tell them apart.
    assert list(found) == ["pcl", "checkpoint.pt", "checkpoint-0001.pt"]
    assert found["pcl"] == found["checkpoint.pt"] != found["checkpoint-0001.pt"]
    assert all(50 < trust <= 100 and 20 < accuracy <= 100 for trust, accuracy in found.values())
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "53 training images of the first 3 classes: head features" in capsys.readouterr().out


def test_some_images_of_some_classes(images, run_folder, tmp_path, capsys, quick):
    arguments = ("--data", images, "--output", tmp_path, "--perplexity", 5, "--features", "backbone", "--workers", 0)
    assert run("map", run_folder, *arguments, "--classes", 2, "--images-per-class", 7) is None
    assert "14 training images of the first 2 classes: backbone features" in capsys.readouterr().out
    task = Map(checkpoint=run_folder, data=images, classes=2, images_per_class=7, perplexity=5.0)
    labels = torch.arange(3).repeat_interleave(18)
    chosen = task._choose(labels)
    assert labels[chosen].bincount().tolist() == [7, 7]
    assert chosen.tolist() == task._choose(labels).tolist()
    assert chosen.tolist() != Map(**{**vars(task), "seed": 1})._choose(labels).tolist()


def run_task(world, task) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pcl_fast.evaluation.tasks.map.embed", embed_quickly)
        evaluate._run(task, world, Console(quiet=True))


def test_two_ranks_equal_one(images, run_folder, tmp_path):
    one, two = (
        Map(checkpoint=run_folder, data=images, output=tmp_path / name, perplexity=5.0, workers=0)
        for name in ("one", "two")
    )
    run_task(ALONE, one)
    run_ranks(2, run_task, two)
    assert scores(one.output)["pcl"] == pytest.approx(scores(two.output)["pcl"], abs=8)


def test_many_points_take_long(images, run_folder):
    said = []
    task = Map(checkpoint=run_folder, data=images)
    for points in (20_000, 52_000):
        task._warn(points, SimpleNamespace(say=said.append))
    assert said == [
        "t-SNE of 52000 points takes about 5 minutes a map on one core; --images-per-class makes them fewer"
    ]


def test_bad_input(images, run_folder, tmp_path):
    command = ("map", run_folder, "--data", images, "--output", tmp_path)
    assert "--classes must be positive, got 0" in run(*command, "--classes", 0)
    assert "--images-per-class must be positive, got 0" in run(*command, "--images-per-class", 0)
    assert "--perplexity must be at least 1, got 0.5" in run(*command, "--perplexity", "0.5")
    assert "nowhere holds no checkpoint" in run(*command, "--beside", tmp_path / "nowhere")
    message = run(*command, "--classes", 1)
    assert "a map with --perplexity 30 needs at least 31 images, there are 18; use a smaller one" in message
    assert Map.obstacle(images, run_folder) is None
    assert Map.obstacle(tmp_path, run_folder) == f"{tmp_path} has no class folders"
