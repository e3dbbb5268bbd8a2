"""Jobs on processes and ranks: everything once, in order, and errors on all ranks."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import torch
from ranks import run_ranks

from pcl_fast.distributed import World
from pcl_fast.evaluation.parallel import own_cores, spread

ALONE = World(0, 1, torch.device("cpu"), None)


def found(function, jobs: int, processes: int, world: World = ALONE) -> list:
    return [
        result
        for part in spread(function, [(number,) for number in range(jobs)], processes=processes, world=world)
        for result in part
    ]


def test_processes_do_all_jobs_in_order():
    """With NumPy's functions, for processes take seconds to import this file. The array is above a megabyte, which
    joblib hands over as a file.
    """
    table = np.arange(300_000.0)
    assert found(partial(np.take, table), 40, processes=2) == table[:40].tolist()
    assert found(partial(np.take, table), 0, processes=2) == []


def test_processes_are_in_groups_of_their_own():
    """So that a terminal's Ctrl-C ends them no earlier than the rank does."""
    [groups] = list(spread(os.getpgid, [(0,)] * 8, processes=2, world=ALONE))
    assert os.getpgid(0) not in groups


def rank_and_twice(world: World) -> list:
    return found(partial(_rank_and_twice, world.rank), 19, processes=1, world=world)


def _rank_and_twice(rank: int, number: int) -> tuple[int, int]:
    return rank, 2 * number


def test_ranks_take_turns():
    expected = [(number % 2, 2 * number) for number in range(16)] + [
        (number % 2, 2 * (16 + number)) for number in range(3)
    ]
    assert run_ranks(2, rank_and_twice) == [expected] * 2


def error_of(world: World) -> str:
    try:
        found(_fails_at_three, 4, processes=1, world=world)
    except ValueError as error:
        return str(error)
    return "none"


def _fails_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("the third job failed")
    return number


def test_an_error_is_raised_on_all_ranks():
    assert run_ranks(2, error_of) == ["the third job failed"] * 2


def test_cores_are_divided_among_the_ranks_of_a_machine(monkeypatch):
    alone = own_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(alone))
    assert own_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(4 * alone))
    assert own_cores() == 1
