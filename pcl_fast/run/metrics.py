"""What a run tells: progress on the terminal, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from pcl_fast.data import ImageSet
from pcl_fast.distributed import World, begin_all_reduce_sum, begin_to_read
from pcl_fast.errors import NonFiniteLossError

FILE = "metrics.jsonl"


class Recorder:
    """Records rows of metrics. On all ranks but the main one every method does nothing.

    A row of metrics.jsonl has `kind` (step, epoch, features, clustering, evaluation, finished), `step`
    (of the whole run) and `epoch`.
    """

    def __init__(self, folder: Path, *, enabled: bool = True, resume_at: tuple[int, int] | None = None):
        """resume_at: (step, length of metrics.jsonl) when the checkpoint was written; what came later is dropped."""
        self.enabled = enabled
        self.console = Console(quiet=not enabled, soft_wrap=True)
        self._bar: Progress | None = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / FILE, "a" if resume_at else "w", encoding="utf-8")  # noqa: SIM115
        if resume_at:
            self._file.truncate(resume_at[1])
            self._file.seek(0, os.SEEK_END)
        self._board = SummaryWriter(folder, purge_step=resume_at[0] + 1 if resume_at else 0)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def row(self, kind: str, step: int, epoch: int, **values: Any) -> None:
        """Write one row; numbers (also in dicts) go to TensorBoard as kind/name."""
        if not self.enabled:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        self._file.flush()
        for name, value in _scalars(values):
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def length(self) -> int:
        """Bytes of metrics.jsonl so far: what belongs to a checkpoint written now."""
        return self._file.tell() if self.enabled else 0

    @contextmanager
    def progress(self, title: str, steps: int, done: int) -> Iterator[None]:
        """A bar over an epoch's steps, where there is a terminal. `advance` moves it."""
        if not (self.enabled and self.console.is_terminal):
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._bar.add_task(title, total=steps, completed=done, note="")
            yield
        self._bar = None

    def advance(self, done: int, values: dict[str, float], batch_size: int) -> None:
        """Move the bar to step `done` of the epoch; show `values` and the speed for a global `batch_size` beside it."""
        if self._bar is not None:
            task = self._bar.tasks[0]
            speed = f", {task.speed * batch_size:.0f} images/s" if task.speed else ""
            self._bar.update(task.id, completed=done, note=_brief(values) + speed)

    def epoch_line(
        self, epoch: int, epochs: int, means: dict[str, float], rate: float, seconds: dict[str, float]
    ) -> None:
        """One line per epoch, with an estimate of what is left from what this epoch took."""
        # Waiting for data is part of training.
        took = sum(value for name, value in seconds.items() if name != "waiting for data")
        left = timedelta(seconds=round((epochs - epoch) * took))
        self.say(f"epoch {epoch}/{epochs}: {describe(means)}, {rate:.0f} images/s, {took:.1f} s, {left} left")

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            self._board.close()


# Number in the run, positions of the batch in the data set, 0-d metrics on the device.
_Step = tuple[int, torch.Tensor, dict[str, torch.Tensor]]


class _Look(NamedTuple):
    """read: for the ranks' sums of a table, a row a step; local: this rank's metrics in it; steps: those it is of."""

    read: Callable[[], list[list[float]]]
    local: torch.Tensor
    steps: list[_Step]
    epoch: int
    done: int
    lr: float


class StepMetrics:
    """Metrics of the steps since the last look. They stay on the device until then, and a look ends a step after it
    began, so that neither host nor device waits for the other.
    """

    def __init__(self, recorder: Recorder, images: ImageSet, world: World, *, batch_size: int):
        """batch_size: images per step over all ranks."""
        self.recorder, self.images, self.world, self.batch_size = recorder, images, world, batch_size
        self._pending: list[_Step] = []
        self._look: _Look | None = None
        self._epoch: list[torch.Tensor] = []
        self._names: list[str] = []

    def add(self, step: int, index: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        """One step's batch (positions in the data set) and its metrics (0-d; "loss" among them)."""
        self._pending.append((step, index, values))

    def begin_look(self, epoch: int, done: int, *, lr: float, wishes: Sequence[bool]) -> None:
        """Begin to average the steps since the last look over all ranks, while the device goes on; see `end_look`.

        Args:
            epoch, done: of the run, for the record and the progress bar.
            lr: learning rate, for the record.
            wishes: of this rank, as many on every rank: to stop, say.
        """
        self._names = list(self._pending[-1][2])
        local = torch.stack([torch.stack([values[name] for name in self._names]) for _, _, values in self._pending])
        # One collective for the metrics and the wishes.
        asked = [torch.full((len(local), 1), float(wish), device=local.device) for wish in wishes]
        table = torch.cat([local, *asked], dim=1)
        read = begin_to_read(lambda: table, begin_all_reduce_sum(table, self.world.group), self.world.device)
        self._look = _Look(read, local, self._pending, epoch, done, lr)
        self._pending = []

    def end_look(self) -> list[bool] | None:
        """Record what the last look found: the last of its steps. Waits for those, but not for later ones.

        Returns:
            For every wish whether any rank had it; None if no look was under way.

        Raises:
            NonFiniteLossError: on every rank, if any rank's loss was not finite.
        """
        if self._look is None:
            return None
        (read, local, pending, epoch, done, lr), self._look = self._look, None
        table = torch.tensor(read()) / self.world.size
        granted, table = (table[-1, local.shape[1] :] > 0).tolist(), table[:, : local.shape[1]]
        self._check_finite(table, local, pending)
        self._epoch += list(table)
        values = self._named(table[-1])
        self.recorder.row("step", pending[-1][0], epoch, **values, lr=lr)
        self.recorder.advance(done, values, self.batch_size)
        return granted

    def epoch_means(self) -> dict[str, float]:
        """Means over the steps since the last call."""
        means = self._named(torch.stack(self._epoch).mean(0))
        self._epoch.clear()
        return means

    def state(self) -> dict[str, list]:
        """The epoch so far, for a checkpoint within it."""
        return {"names": self._names, "steps": [step.tolist() for step in self._epoch]}

    def load(self, state: dict[str, list]) -> None:
        """Go on with the epoch of `state`; of an empty one with none."""
        self._names = state.get("names", [])
        self._epoch = [torch.tensor(step) for step in state.get("steps", [])]

    def _named(self, values: torch.Tensor) -> dict[str, float]:
        return dict(zip(self._names, values.tolist(), strict=True))

    def _check_finite(self, table: torch.Tensor, local: torch.Tensor, steps: list[_Step]) -> None:
        loss = self._names.index("loss")
        bad = (~table[:, loss].isfinite()).nonzero().view(-1)
        if not len(bad):
            return
        first = int(bad[0])
        step, index, _ = steps[first]
        if local[first, loss].isfinite():
            raise NonFiniteLossError(f"the loss of step {step} is not finite on another rank, which names the images")
        indices = index.tolist()
        raise NonFiniteLossError(
            f"the loss of step {step} is {local[first, loss].item()}; that step was not applied and the last "
            f"checkpoint stands. The batch's images are {indices}, the first of them {self.images.name(indices[0])}"
        )


class Stopwatch:
    """Seconds of wall clock per named phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """The phases so far, rounded to milliseconds; starts again from nothing."""
        taken = {name: round(value, 3) for name, value in self.seconds.items()}
        self.seconds = {}
        return taken


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl."""
    with open(folder / FILE, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def describe(values: dict[str, float]) -> str:
    """ "loss 3.142, instance 7.1, ..." """
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


def _brief(values: dict[str, float]) -> str:
    """Instance and prototype part of loss and accuracy, short enough for a terminal of 80 columns."""
    parts = ("instance", "prototype")
    loss = " + ".join(f"{values[f'{part}_loss']:.2f}" for part in parts if f"{part}_loss" in values)
    right = " / ".join(f"{values[f'{part}_accuracy']:.0f}" for part in parts if f"{part}_accuracy" in values)
    return f"loss {loss}, right {right} %"


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value
