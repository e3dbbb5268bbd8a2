"""Score an encoder by the protocols of the paper's tables.

    python -m pcl_fast.evaluate TASK CHECKPOINT --data DIR [--flags]
    torchrun --standalone --nproc-per-node=G -m pcl_fast.evaluate TASK CHECKPOINT --data DIR [--flags]

Every task prints a table with the paper's figures below ours and writes TASK.json and TASK.png.
"""

from __future__ import annotations

import functools
import operator
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from pcl_fast.command import command
from pcl_fast.distributed import World, all_or_none, check_same, connect, disconnect
from pcl_fast.errors import UserError
from pcl_fast.evaluation.continuation import Continuation
from pcl_fast.evaluation.labelled import TEST, TRAIN
from pcl_fast.evaluation.results import as_table, write_results
from pcl_fast.evaluation.tasks import Context, Options, Task
from pcl_fast.files import make_folder
from pcl_fast.pretrained import THE_ONLY_ONE, Pretrained, read_pretrained
from pcl_fast.run.launcher import end_with_launcher
from pcl_fast.run.ownership import owned
from pcl_fast.run.signals import Stopped, StopSignals
from pcl_fast.seeds import check_seed


@dataclass(frozen=True, kw_only=True)
class All(Options):
    """Run every task that the data allow, each with its usual settings."""


def main() -> None:
    kinds = {"all": All, **dict(sorted(Task.named.items()))}
    commands = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items())
    with command("pcl_fast.evaluate"):
        options = tyro.cli(functools.reduce(operator.or_, commands), prog="pcl_fast.evaluate", description=__doc__)
        end_with_launcher()
        run(options)


def run(options: Options) -> bool:
    """Run a task, or all; return False if a signal stopped it early.

    Raises:
        ValueError, UserError, OSError: something given cannot be used; says what, and what to do.
    """
    tasks = [options] if isinstance(options, Task) else list(_possible(options))
    check_seed(options.seed)
    for task in tasks:
        task.check()
    world = connect()
    torch.backends.cudnn.benchmark = True
    console = Console(quiet=not world.is_main, soft_wrap=True)
    failed: list[str] = []
    try:
        for task in tasks:
            try:
                _run(task, world, console)
            except (ValueError, UserError) as error:
                if isinstance(options, Task):
                    raise
                failed.append(task.name)
                console.print(f"{task.name} cannot be done: {error}", highlight=False, markup=False)
    except Stopped:
        console.print("stopped by a signal, all is saved; the same command goes on from here")
        disconnect(world)
        return False
    disconnect(world)
    if failed:
        raise UserError("of all tasks these could not be done, see above: " + ", ".join(failed))
    return True


def _possible(options: Options) -> Iterator[Task]:
    """Yield the tasks that the data allow, and print why others are left out.

    Raises:
        ValueError: there is none.
    """
    if not options.data.is_dir():
        raise ValueError(f"--data {options.data} is not a folder")
    obstacles = {name: kind.obstacle(options.data, options.checkpoint) for name, kind in sorted(Task.named.items())}
    if all(obstacles.values()):
        reasons = "\n  ".join(f"{name}: {reason}" for name, reason in obstacles.items())
        raise ValueError(f"the data allow no task:\n  {reasons}")
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    for name, reason in obstacles.items():
        if reason is None:
            yield Task.named[name].among_all(**given)
        elif os.environ.get("RANK", "0") == "0":
            print(f"{name} is left out: {reason}", flush=True)


def _run(task: Task, world: World, console: Console) -> None:
    begin = time.perf_counter()

    def read(path: Path, encoder: str) -> Pretrained:
        return all_or_none(lambda: read_pretrained(path, encoder, or_only=task.encoder is None).to(world.device), world)

    pretrained = read(task.checkpoint, task.encoder or task.scores)
    check_same("the checkpoint", pretrained.checksum, world, advice="give all machines the same file")
    output = task.output or _beside(task.checkpoint)
    _check_apart(output, task.data)
    with ExitStack() as stack:
        all_or_none(lambda: stack.enter_context(owned(output, task.name)) if world.is_main else None, world)
        all_or_none(lambda: make_folder(output), world)
        settings = {**task.settings(), "checkpoint": pretrained.checksum}
        continuation = Continuation(output / f"{task.name}.part.pt", settings, StopSignals(), world)
        _score(task, Context(world, pretrained, read, output, continuation, console), begin)


def _score(task: Task, context: Context, begin: float) -> None:
    """Run the task, print its table and write its results. begin: of time.perf_counter()."""
    world, pretrained = context.world, context.pretrained
    encoder = "only" if pretrained.encoder == THE_ONLY_ONE else pretrained.encoder
    context.say(f"{task.name} scores the {encoder} encoder of {pretrained.path}: {pretrained.source}")
    for line in pretrained.notes:
        context.say(line)
    outcome = task.run(context)
    for line in outcome.protocol:
        context.say(line)
    context.console.print(as_table(outcome, task.name))
    seconds = time.perf_counter() - begin

    def write() -> None:
        paths = write_results(
            context.output, task, pretrained, outcome, ranks=world.size, device=_name(world), seconds=seconds
        )
        context.say(f"{task.name} took {seconds:.0f} s; results in {' and '.join(map(str, paths))}")

    all_or_none(lambda: write() if world.is_main else None, world)
    context.continuation.finish()  # not before the results are there


def _check_apart(output: Path, data: Path | None) -> None:
    """Refuse results among the images before there is anything of them. (Where a link leads to is seen when the images
    are opened.)

    Raises:
        ValueError: the output lies in a folder of images.
    """
    if data is None:  # a task that looks at two runs' clusters alone
        return
    parts = [data / part for part in (TRAIN, TEST) if (data / part).is_dir()] or [data]
    if any(output.resolve().is_relative_to(part.resolve()) for part in parts):
        raise ValueError(f"--output {output} lies inside --data {data}, among its images; choose another --output")


def _beside(checkpoint: Path) -> Path:
    """Return the folder `evaluation` of a run, or beside a file."""
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "evaluation"


def _name(world: World) -> str:
    cuda = world.device.type == "cuda"
    return torch.cuda.get_device_name(world.device) if cuda else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
