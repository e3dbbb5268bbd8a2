"""The sizes of a run's clusters beside another run's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from launches import evaluate as run
from saved_runs import save_run

from pcl_fast.evaluation.tasks.cluster_sizes import ClusterSizes


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """With estimated and with fixed concentration, before the first E-step, and MoCo."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "pcl", 60, ks=(4, 9))
    save_run(folder / "fixed", 60, ks=(4, 9), fixed=True)
    save_run(folder / "young", 60, ks=(4, 9), epochs=1)
    save_run(folder / "moco", 60, ks=())
    # A cluster of more than half of the images.
    state = torch.load(folder / "fixed" / "checkpoint.pt", weights_only=True)
    state["method"]["prototypes.granularities.1.assignment"][:40] = 2
    torch.save(state, folder / "fixed" / "checkpoint.pt")
    return folder


def scores(folder: Path) -> list[dict]:
    return json.loads((folder / "cluster-sizes.json").read_text())["scores"]


def test_two_runs_without_images(runs, tmp_path):
    command = ("cluster-sizes", runs / "pcl", "--against", runs / "fixed", "--output", tmp_path)
    assert run(*command) is None
    rows = scores(tmp_path)
    assert [row["name"] for row in rows] == ["pcl, estimated concentration", "fixed, fixed concentration"]
    for row, name in zip(rows, ("pcl", "fixed"), strict=True):
        method = torch.load(runs / name / "checkpoint.pt", weights_only=True)["method"]
        assignment = method["prototypes.granularities.1.assignment"].tolist()
        sizes = np.array([assignment.count(c) for c in range(9)])
        assert row["clusters"] == 9
        assert row["mean size"] == pytest.approx(60 / 9)
        assert row["standard deviation"] == pytest.approx(sizes.std())
        assert row["empty, %"] == pytest.approx(100 * (sizes == 0).mean())
        assert row["largest"] == sizes.max()
    assert rows[1]["largest"] >= 40
    assert (tmp_path / "cluster-sizes.png").read_bytes().startswith(b"\x89PNG")


def test_another_granularity(runs, tmp_path):
    assert run("cluster-sizes", runs / "pcl", "--k", 4, "--output", tmp_path) is None
    [row] = scores(tmp_path)
    assert (row["clusters"], row["mean size"]) == (4, 15)
    assert "pcl has not 5 clusters but 4, 9; choose one of these by --k" in run("cluster-sizes", runs / "pcl", "--k", 5)


def test_runs_without_clusters(runs, tmp_path):
    reason = "holds no prototypes: its method makes none, or it is from before the first E-step"
    for name in ("young", "moco"):
        assert reason in run("cluster-sizes", runs / name)
        assert reason in run("cluster-sizes", runs / "pcl", "--against", runs / name, "--output", tmp_path)
        assert reason in ClusterSizes.obstacle(tmp_path, runs / name)
    assert ClusterSizes.obstacle(tmp_path, runs / "pcl") is None
    assert ClusterSizes.obstacle(tmp_path, runs / "pcl" / "checkpoint-0002.pt") is None
    assert "holds no checkpoint" in ClusterSizes.obstacle(tmp_path, tmp_path)
    assert ClusterSizes(checkpoint=runs / "pcl", data=tmp_path).settings()["data"] == str(tmp_path)
