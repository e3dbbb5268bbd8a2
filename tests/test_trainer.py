"""The trainer's own decisions. Whole runs are in test_train.py."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pcl_fast.clustering import cluster, kmeans
from pcl_fast.config import PRESETS
from pcl_fast.trainer import Trainer


def clusterings(init: str, monkeypatch) -> list[dict]:
    """Arguments of the k-means of three E-steps in a row."""
    calls = []

    def recorded(*arguments, **options):
        calls.append(options)
        return cluster(*arguments, **options)

    monkeypatch.setattr("pcl_fast.trainer.cluster", recorded)
    config = PRESETS["demo"][1]
    config = replace(config, cluster=replace(config.cluster, ks=(3, 5), redo=2, init=init, warm_iterations=4))
    trainer = object.__new__(Trainer)
    trainer.config, trainer.world, trainer.prototypes = config, SimpleNamespace(group=None), []
    trainer._row = lambda *_, **__: None
    features = F.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    for trainer.epoch in (4, 5, 6):
        before = trainer.prototypes
        trainer._cluster(features)
        if calls[-1]["init"] is not None:
            expected = kmeans(features, 5, iterations=4, init=before[1].centroids, seed=calls[-1]["seed"] + 1)
            assert torch.equal(trainer.prototypes[1].assignment, expected.assignment)
    return calls


def test_kmeans_starts_at_random_by_default(monkeypatch):
    assert all(config.cluster.init == "random" for _, config in PRESETS.values())
    for call in clusterings("random", monkeypatch):
        assert (call["init"], call["redo"], call["iterations"]) == (None, 2, PRESETS["demo"][1].cluster.iterations)


def test_kmeans_can_start_from_the_last_prototypes(monkeypatch):
    first, *others = clusterings("previous", monkeypatch)
    assert (first["init"], first["redo"]) == (None, 2)
    for call in others:
        assert (call["redo"], call["iterations"]) == (1, 4)
        assert [len(centroids) for centroids in call["init"]] == [3, 5]


@pytest.mark.parametrize("init", ["random", "previous"])
def test_seeds_differ_by_epoch(init, monkeypatch):
    assert len({call["seed"] for call in clusterings(init, monkeypatch)}) == 3
