"""Independent jobs on all of a run's processor cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError

from pcl_fast.distributed import World, all_or_none, gather_objects
from pcl_fast.errors import UserError

# Each process does about so many jobs before the ranks exchange what they have found.
_TURN = 8


def own_cores() -> int:
    """Return how many of this machine's cores this rank may use: as many as each of its other ranks."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def spread(function: Callable[..., Any], jobs: Sequence[tuple], *, processes: int, world: World) -> Iterator[list[Any]]:
    """Yield function(*job) for all jobs, in their order, on all ranks: a list for some of them, one for the next...

    All ranks must have the same jobs, and iterate to the end together. Large arrays that `function` is bound to
    (functools.partial) lie in memory once, however many processes there are. Each computes with one thread. They are
    processes and not threads because liblinear has one random generator, which threads would take numbers from in turn:
    no two runs would find the same.

    Args:
        function: can be pickled, for this machine's own processes; it may raise ValueError, OSError or UserError,
            which all ranks then raise. Its results are such as `gather_objects` takes.
        processes: how many work for this rank; 1: this process itself.

    Raises:
        UserError: the system has ended a process, most likely because memory ran out.
    """
    length = _TURN * max(gather_objects(processes, world)) * world.size
    # Terminals signal a whole process group; when the work ends is for the rank to say.
    apart = {"initializer": os.setpgid, "initargs": (0, 0)}
    with parallel_config("loky", n_jobs=processes, inner_max_num_threads=1, **apart), Parallel() as parallel:
        for begin in range(0, len(jobs), length):
            turn = jobs[begin : begin + length]
            found = all_or_none(lambda mine=turn[world.rank :: world.size]: _run(parallel, function, mine), world)
            results: list[Any] = [None] * len(turn)
            for rank, part in enumerate(gather_objects(found, world)):
                results[rank :: world.size] = part
            yield results


def _run(parallel: Parallel, function: Callable[..., Any], jobs: Sequence[tuple]) -> list[Any]:
    try:
        return parallel(delayed(function)(*job) for job in jobs)
    except TerminatedWorkerError as error:
        raise UserError(
            "a process was ended by the system, most likely for lack of memory; use fewer --jobs"
        ) from error
