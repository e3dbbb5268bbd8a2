"""Work that a signal stops goes on where it was saved."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from pcl_fast.distributed import World
from pcl_fast.errors import CheckpointError
from pcl_fast.evaluation.continuation import Continuation
from pcl_fast.run.signals import Stopped, StopSignals


def continuation(folder: Path, world: World, **settings) -> Continuation:
    return Continuation(folder / "task.part.pt", {"lr": 0.1, **settings}, StopSignals(), world)


def count_up_to(folder: Path, world: World, last: int, *, signal_at: int | None = None, on_rank: int = 0) -> list[int]:
    """Count from where it was saved; returns the numbers."""
    work = continuation(folder, world)
    found = work.load()
    numbers = [] if found is None else found["numbers"].tolist()
    with work.saving():
        for number in range(len(numbers), last):
            numbers.append(number)
            if number == signal_at and world.rank == on_rank:
                os.kill(os.getpid(), signal.SIGTERM)
            work.reached(number + 1, lambda: {"numbers": torch.tensor(numbers)})
    work.finish()
    return numbers


def test_goes_on_from_the_step_that_was_reached(tmp_path, alone):
    with pytest.raises(Stopped):
        count_up_to(tmp_path, alone, 6, signal_at=3)
    assert continuation(tmp_path, alone).load()["numbers"].tolist() == [0, 1, 2, 3]
    assert count_up_to(tmp_path, alone, 6) == [0, 1, 2, 3, 4, 5]
    assert list(tmp_path.iterdir()) == []


def test_saves_as_time_passes(tmp_path, alone, monkeypatch):
    monkeypatch.setattr("pcl_fast.evaluation.continuation._SECONDS_BETWEEN_SAVES", 0)
    work = continuation(tmp_path, alone)
    work.reached(1, lambda: {"it": 7})
    assert continuation(tmp_path, alone).load() == {"it": 7}


def test_other_settings_are_refused(tmp_path, alone):
    with pytest.raises(Stopped):
        count_up_to(tmp_path, alone, 6, signal_at=3)
    with pytest.raises(ValueError, match=r"(?s)under other settings that was stopped.* anew:\n  lr: 0.1 -> 1"):
        continuation(tmp_path, alone, lr=1).load()


def test_a_spoiled_file(tmp_path, alone):
    (tmp_path / "task.part.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"task.part.pt is damaged; delete it to start anew"):
        continuation(tmp_path, alone).load()


def stop_on_the_other_rank(world: World, folder: Path) -> list[int]:
    try:
        count_up_to(folder, world, 6, signal_at=2, on_rank=1)
    except Stopped:
        return count_up_to(folder, world, 6)
    raise AssertionError("the signal was not noticed")


def test_all_ranks_stop_together(tmp_path):
    assert run_ranks(2, stop_on_the_other_rank, tmp_path) == [[0, 1, 2, 3, 4, 5]] * 2
