"""--deterministic: what a GPU is told, for the same bits from run to run. tests/pretended runs it for a GPU."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from launches import same_state
from tiny import tiny

from pcl_fast.train import run


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    benchmark, fill = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_nothing_is_chosen_by_time_and_a_cpu_computes_the_same(image_folder, tmp_path, alone):
    changes = {"epochs": 1, "cluster__ks": (3,), "cluster__warmup_epochs": 0, "log_every": 2}
    assert run(tiny(image_folder, tmp_path / "usual", **changes), alone)
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tiny(image_folder, tmp_path / "deterministic", **changes, deterministic=True), alone)
    assert not torch.backends.cudnn.benchmark
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    same_state(tmp_path / "usual", tmp_path / "deterministic")
