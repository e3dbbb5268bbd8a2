"""How a long task that was stopped goes on with the same command."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pcl_fast.distributed import World, all_or_none, all_reduce_sum, check_same
from pcl_fast.errors import CheckpointError
from pcl_fast.files import remove_unfinished, write_whole
from pcl_fast.run.signals import Stopped, StopSignals
from pcl_fast.torch_files import read_torch

# Long enough that saving costs nothing, short enough to lose little.
_SECONDS_BETWEEN_SAVES = 600.0


class Continuation:
    """The state of unfinished work, in a file beside the results. All ranks call its methods together."""

    def __init__(self, path: Path, settings: dict[str, Any], signals: StopSignals, world: World):
        """
        Args:
            path: of the file.
            settings: plain values that must be the same for the work to go on: the options, the checkpoint, the data.
            signals: notes whether the process is asked to stop.
        """
        self.path, self.settings, self.signals, self.world = path, settings, signals, world
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the state that `reached` saved last, on every rank and on the CPU, or None if the work is new.

        Raises:
            CheckpointError: the file cannot be read.
            ValueError: it is of other settings, names them; or ranks find different files.
        """
        found = all_or_none(self._read, self.world)
        told = "nothing to go on with" if found is None else f"step {found['step']}"
        advice = "--output must be a folder that all machines share"
        check_same(f"what they find at {self.path}", told, self.world, advice=advice)
        return None if found is None else found["state"]

    def _read(self) -> dict[str, Any] | None:
        if self.world.is_main:
            remove_unfinished(self.path)
        if not self.path.exists():
            return None
        try:
            found = read_torch(self.path)
            before = found["settings"]
        except (CheckpointError, LookupError, TypeError) as error:
            raise CheckpointError(f"{self.path} is damaged; delete it to start anew") from error
        names = sorted(before.keys() | self.settings.keys())
        changed = [name for name in names if before.get(name) != self.settings.get(name)]
        if changed:
            lines = [f"{name}: {before.get(name)} -> {self.settings.get(name)}" for name in changed]
            raise ValueError(
                f"{self.path} is of work under other settings that was stopped; go back to them, or delete it to start "
                "anew:\n  " + "\n  ".join(lines)
            )
        return found

    @contextmanager
    def saving(self) -> Iterator[None]:
        """In this context, which calls `reached` again and again, a signal is noted until the work can be saved.
        Elsewhere it ends the process at once, for there is nothing to save.
        """
        with self.signals:
            yield

    def reached(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Say that so many steps of the work are done. It waits for all ranks and for the device: call it every 50
        steps or so.

        Args:
            step: the number of steps.
            state: returns tensors and plain values, from which `load` lets the work go on. It is called on all ranks
                when it is time to save; the main rank's is kept.

        Raises:
            Stopped: any rank was asked to stop; the state is saved.
            OSError: it cannot be written.
        """
        late = self.world.is_main and time.monotonic() - self._saved >= _SECONDS_BETWEEN_SAVES
        votes = torch.tensor([self.signals.asked, late], dtype=torch.int32, device=self.world.device)
        stop, save = all_reduce_sum(votes, self.world.group).tolist()
        if not (stop or save):
            return
        found = {"settings": self.settings, "step": step, "state": state()}
        all_or_none(lambda: self._write(found) if self.world.is_main else None, self.world)
        self._saved = time.monotonic()
        if stop:
            raise Stopped

    def _write(self, found: dict[str, Any]) -> None:
        write_whole(self.path, lambda file: torch.save(found, file))

    def finish(self) -> None:
        """Remove the file: the work is done."""
        if self.world.is_main:
            self.path.unlink(missing_ok=True)
