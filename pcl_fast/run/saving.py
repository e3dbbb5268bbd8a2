"""When a run saves, what it saves, and what it takes up again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcl_fast.config import Config, recipe_differences, to_dict
from pcl_fast.distributed import World, all_or_none, check_same, gather_objects
from pcl_fast.files import remove_unfinished
from pcl_fast.learner import Learner
from pcl_fast.run.checkpoint import NAME, load_checkpoint, save_checkpoint, size_of
from pcl_fast.run.room import check_room

# Patterns of the names under which something is written whole.
_WRITTEN = ("checkpoint*.pt", "config.json", "metrics.jsonl*", "report.png")


@dataclass
class Progress:
    """How far a run has come: epochs done, steps done in the one under way, and whether it is at its end."""

    epoch: int = 0
    step: int = 0
    finished: bool = False


class Saver:
    """Saves a run and takes it up again. All ranks call its methods together."""

    def __init__(self, config: Config, fingerprint: str, world: World):
        """fingerprint: of the data set, see ImageSet.fingerprint."""
        self.config, self.fingerprint, self.world = config, fingerprint, world
        self._saved = time.monotonic()

    def save(self, learner: Learner, progress: Progress, record: dict[str, Any], *, keep: bool = False) -> None:
        """Write the checkpoint. Returns on all ranks when the file is there: where one rank is gone, a launcher may end
        the others.

        Args:
            record: "global_step", "metrics_length" and "epoch_metrics", see checkpoint.py.
            keep: also keep it as that of its epoch.
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
        """Take up the last checkpoint of the run, if there is one.

        Returns:
            How far the run has come, and what `save` got as its record; a new Progress and {} for a new run.

        Raises:
            CheckpointError: it cannot be read; on every rank.
            ValueError: the ranks find different checkpoints; it is another recipe's, another method's or of another
                data set; or the method cannot go on with this number of ranks.
        """
        folder = self.config.output
        state = load_same_checkpoint(folder, self.world)
        if self.world.is_main:
            for name in _WRITTEN:
                remove_unfinished(folder / name)
        if state is None:
            return Progress(), {}
        check_same_run(state, self.config, self.fingerprint)
        all_or_none(lambda: learner.load(state, state["ranks"]), self.world)
        record = {name: state[name] for name in ("global_step", "metrics_length", "epoch_metrics")}
        return Progress(state["epoch"], state["step"], state["finished"]), record

    def check_room(self, learner: Learner, progress: Progress) -> list[str]:
        """Look whether the disk has room for the checkpoints to come; returns lines for the log.

        Raises:
            OSError: not even for the next one; on every rank.
        """
        folder, epochs = self.config.output, range(progress.epoch + 1, self.config.epochs + 1)

        def check() -> list[str]:
            folder.mkdir(parents=True, exist_ok=True)
            size = size_of(learner.state()) + self.world.size * size_of(learner.own_state())
            first = not (folder / NAME).exists()
            return check_room(folder, size, kept=sum(map(self.is_kept, epochs)), first=first)

        return all_or_none(lambda: check() if self.world.is_main and not progress.finished else [], self.world)


def load_same_checkpoint(folder: Path, world: World) -> dict[str, Any] | None:
    """The last checkpoint in a folder, on every rank; None if there is none. Ranks that went on from different steps
    would wait for each other for ever.

    Raises:
        CheckpointError: it cannot be read; on every rank.
        ValueError: the ranks find different checkpoints, or some find none; says on which machines.
    """
    state = all_or_none(lambda: load_checkpoint(folder), world)
    found = "no checkpoint"
    if state is not None:
        found = f"the checkpoint of step {state['global_step']}" + (", the last" if state["finished"] else "")
    advice = "--output must be a folder that all machines share"
    check_same(f"what they find in {folder}", found, world, advice=advice)
    return state


def check_same_run(state: dict[str, Any], config: Config, fingerprint: str) -> None:
    """Refuse another run's checkpoint.

    Raises:
        ValueError: it belongs to another method, recipe or data set; names what differs.
    """
    method = state["config"]["method"]
    if method != config.method:
        raise ValueError(
            f"{config.output} holds a run of the method {method}, not of {config.method}; choose another --output, or "
            f"go on with its own preset, {state['config']['preset']}"
        )
    differences = recipe_differences(state["config"], to_dict(config))
    if state["data"] != fingerprint:
        differences.append(f"data set: {state['data']} -> {fingerprint}")
    if differences:
        raise ValueError(
            f"{config.output} holds a run under another recipe; choose another --output, or go back to its values:\n  "
            + "\n  ".join(differences)
        )
