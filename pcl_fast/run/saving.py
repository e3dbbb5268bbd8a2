"""When a run saves, what it saves, and what it takes up again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcl_fast.config import Config, to_dict
from pcl_fast.distributed import World, all_or_none, check_same, gather_objects
from pcl_fast.files import make_folder, remove_unfinished
from pcl_fast.learner import Learner
from pcl_fast.run.checkpoint import (
    NAME,
    Last,
    bytes_to_give_up,
    check_finite,
    check_whole,
    has_previous,
    load_checkpoint,
    load_last,
    put_back,
    save_checkpoint,
    size_of,
)
from pcl_fast.run.continuing import check_same_run, check_taken_up
from pcl_fast.run.feature_choice import ALL
from pcl_fast.run.fusion_choice import EAGER
from pcl_fast.run.room import check_room

# On a GPU; a CPU's layers are decided anew at every start.
_OF_EARLIER_VERSIONS = {"kernels_off": [], "fusion": EAGER, "unfused_layers": ALL}
# Patterns of the names under which something is written whole.
_WRITTEN = ("checkpoint*.pt", "config.json", "metrics.jsonl*", "report.png")


@dataclass
class Progress:
    """How far a run has come: epochs done, steps done in the one under way, and whether it is at its end."""

    epoch: int = 0
    step: int = 0
    finished: bool = False


class Saver:
    """Saves a run and takes it up again. All ranks call its methods together.

    notes: lines for the log at the start of a run.
    missing: how many checkpoints the run should save before it goes on: it always has two, so that there is one to fall
        back on if the disk spoils the other.
    """

    def __init__(self, config: Config, fingerprint: str, world: World):
        """fingerprint: of the data set, see ImageSet.fingerprint."""
        self.config, self.fingerprint, self.world = config, fingerprint, world
        self.notes: list[str] = []
        self.missing = 2
        self._saved = time.monotonic()

    def save(self, learner: Learner, progress: Progress, record: dict[str, Any], *, keep: bool = False) -> None:
        """Write the checkpoint. Returns on all ranks when the file is there: where one rank is gone, a launcher may end
        the others.

        Args:
            record: "global_step", "metrics_length", "epoch_metrics" and "choices", see checkpoint.py.
            keep: also keep it as that of its epoch.

        Raises:
            NonFiniteError: a weight, or anything else of it, is not finite; names it. The last checkpoint stands.
            OSError: it cannot be written.
        """
        ranks = gather_objects(learner.own_state(), self.world)

        def write() -> None:
            state = {
                "config": to_dict(self.config),
                "data": self.fingerprint,
                **vars(progress),
                **record,
                **learner.state(),
                "ranks": ranks,
            }
            check_finite(state)
            save_checkpoint(self.config.output, state, keep_as=f"checkpoint-{progress.epoch:04d}.pt" if keep else None)

        all_or_none(write if self.world.is_main else lambda: None, self.world)
        self._saved = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last checkpoint is old enough for another within an epoch, by the main rank's clock."""
        minutes = self.config.checkpoint.every_minutes
        return self.world.is_main and minutes > 0 and time.monotonic() - self._saved >= 60 * minutes

    def is_kept(self, epoch: int) -> bool:
        """Whether the checkpoint after so many epochs is kept under its own name."""
        every = self.config.checkpoint.keep_every
        return every > 0 and epoch % every == 0

    def restore(self, learner: Learner) -> tuple[Progress, dict[str, Any]]:
        """Take up the last checkpoint of the run, or for a new run that of config.resume_from, if there is one. What
        there is to say about it is in `notes` then.

        Returns:
            How far the run has come, and what `save` got as its record; a new Progress and {} for a new run.

        Raises:
            CheckpointError: it cannot be read; on every rank.
            ValueError: the ranks find different checkpoints; it is another recipe's, another method's or of another
                data set; or the method cannot go on with this number of ranks.
            OSError: there is no room for the next one.
        """
        state = self._last()
        self.missing = 2 if state is None else self._missing_one()
        if self.world.is_main:
            for name in _WRITTEN:
                remove_unfinished(self.config.output / name)
        if state is not None:
            self.notes += check_same_run(state, self.config, self.fingerprint)
        elif self.config.resume_from is not None:
            state = self._taken_up(self.config.resume_from)
        progress, record = Progress(), {}
        if state is not None:
            all_or_none(lambda: learner.load(state, state["ranks"]), self.world)
            progress = Progress(state["epoch"], state["step"], state["finished"])
            record = {name: state[name] for name in ("global_step", "metrics_length", "epoch_metrics")}
            record["choices"] = state.get("choices", _OF_EARLIER_VERSIONS)
        self._check_room(learner, progress)
        return progress, record

    def _last(self) -> dict[str, Any] | None:
        """The run's own last checkpoint, or None if it is new."""
        found: list[Last] = []

        def load(folder: Path) -> dict[str, Any] | None:
            found.append(load_last(folder))
            return found[0].state

        folder = self.config.output
        state = load_same_checkpoint(folder, self.world, load)
        (last,) = found
        if last.fault and last.file:
            all_or_none(lambda: put_back(folder, last.file) if self.world.is_main else None, self.world)
        self.notes += [last.fault] if last.fault else []
        return state

    def _missing_one(self) -> int:
        """1 if there is no checkpoint before the last, else 0."""
        return gather_objects(self.world.is_main and int(not has_previous(self.config.output)), self.world)[0]

    def _taken_up(self, path: Path) -> dict[str, Any]:
        """The state of another run's checkpoint, as it is for a new run."""
        if (path if path.is_dir() else path.parent).resolve() == self.config.output.resolve():
            raise ValueError(f"--resume-from {path} lies in --output; choose a new --output, where the run goes on")
        state = load_same_checkpoint(path, self.world)
        if state is None:
            raise ValueError(f"--resume-from {path}: there is no checkpoint")
        self.notes += check_taken_up(state, self.config, self.fingerprint)
        # Its record stays where it is, and a new run chooses anew how it computes.
        return {**state, "metrics_length": 0, "choices": None}

    def _check_room(self, learner: Learner, progress: Progress) -> None:
        """Look whether the disk has room for the checkpoints to come.

        Raises:
            OSError: not even for the next one; on every rank.
        """
        folder, epochs = self.config.output, range(progress.epoch + 1, self.config.epochs + 1)

        def check() -> list[str]:
            make_folder(folder)
            size = size_of(learner.state()) + self.world.size * size_of(learner.own_state())
            first = not (folder / NAME).exists()
            every = self.config.checkpoint.keep_every
            kept = self.config.epochs // every - progress.epoch // every if every else 0
            return check_room(folder, size, kept=kept, first=first, given_up=bytes_to_give_up(folder))

        self.notes += all_or_none(lambda: check() if self.world.is_main and epochs else [], self.world)


def load_same_checkpoint(
    path: Path, world: World, load: Callable[[Path], dict[str, Any] | None] = load_checkpoint
) -> dict[str, Any] | None:
    """The checkpoint load(path), or None if there is none, if it is the same on every rank. Ranks that went on from
    different steps would wait for each other for ever.

    Raises:
        CheckpointError: it cannot be read, or lacks something; on every rank.
        ValueError: the ranks find different checkpoints, or some find none; says on which machines.
    """

    def checked() -> dict[str, Any] | None:
        state = load(path)
        if state is not None:
            check_whole(state, path)
        return state

    state = all_or_none(checked, world)
    found = "no checkpoint"
    if state is not None:
        found = f"the checkpoint of step {state['global_step']}" + (", the last" if state["finished"] else "")
    advice = "--output must be a folder that all machines share"
    check_same(f"what they find in {path}", found, world, advice=advice)
    return state
