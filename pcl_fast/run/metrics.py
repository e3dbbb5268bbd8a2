"""What a run tells: progress on the terminal, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
from pcl_fast.errors import DIVERGED, NonFiniteError
from pcl_fast.files import make_folder
from pcl_fast.learner import FINITE
from pcl_fast.methods import Metric
from pcl_fast.run.rows import FILE, GAP, RowFile, mend, read_rows

__all__ = ["Recorder", "StepMetrics", "Stopwatch", "describe", "read_rows"]


class Recorder:
    """Records rows of metrics. On all ranks but the main one every method does nothing.

    A row of metrics.jsonl has `kind` (kernels, step, epoch, features, clustering, evaluation, finished, gap),
    `step` (of the whole run) and `epoch`.
    """

    def __init__(
        self,
        folder: Path,
        metrics: dict[str, Metric],
        *,
        enabled: bool = True,
        resume_at: tuple[int, int, int] | None = None,
    ):
        """
        Args:
            metrics: how the method's metrics are shown.
            resume_at: (step, epoch, length of metrics.jsonl) when the checkpoint was written; what came later is
                dropped, and what is missing of it becomes a row.
        """
        self.enabled, self.metrics = enabled, metrics
        self.console = Console(quiet=not enabled, soft_wrap=True)
        self._bar: Progress | None = None
        if not enabled:
            return
        from pcl_fast.run.board import Board  # TensorBoard takes a second to import

        make_folder(folder)
        step, epoch, length = resume_at or (-1, 0, 0)
        keep, missing = mend(folder / FILE, length, step) if resume_at else (0, None)
        self._file = RowFile(folder / FILE, keep=keep)
        self._board = Board(folder, purge_step=step + 1, say=self.say)
        if missing:
            self.say(f"{missing}: the run goes on without what was there")
            self.row(GAP, step, epoch, missing=missing)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def row(self, kind: str, step: int, epoch: int, **values: Any) -> None:
        """Write one row; numbers (also in dicts) go to TensorBoard as kind/name."""
        if not self.enabled:
            return
        self._file.append({"kind": kind, "step": step, "epoch": epoch, **values})
        for name, value in _scalars(values):
            self._board.add(f"{kind}/{name}", value, step)

    def sync(self) -> int:
        """Make all rows durable; return the bytes of metrics.jsonl, what belongs to a checkpoint written now.

        Raises:
            OSError: the disk does not take them.
        """
        if not self.enabled:
            return 0
        self._board.flush()
        return self._file.sync()

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
            self._bar.update(task.id, completed=done, note=_brief(values, self.metrics) + speed)

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


class _Reduction(NamedTuple):
    """read: for the ranks' sums of a table, a row a step; local: this rank's metrics in it; steps: those it is of;
    names: of its columns, those of the votes last.
    """

    read: Callable[[], list[list[float]]]
    local: torch.Tensor
    steps: list[_Step]
    names: list[str]
    epoch: int
    done: int
    lr: float


class StepMetrics:
    """The metrics of the steps since the last reduction over the ranks. They stay on the device until then, and a
    reduction ends a step after it began, so that neither host nor device waits for the other. The ranks' votes travel
    with it.
    """

    def __init__(self, recorder: Recorder, images: ImageSet, world: World, *, batch_size: int):
        """batch_size: images per step over all ranks."""
        self.recorder, self.images, self.world, self.batch_size = recorder, images, world, batch_size
        self._pending: list[_Step] = []
        self._reduction: _Reduction | None = None
        self._epoch: list[torch.Tensor] = []
        self._names: list[str] = []

    def add(self, step: int, index: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        """Take one step's batch (positions in the data set) and what Learner.step returned for it."""
        self._pending.append((step, index, values))

    def begin_reduction(self, epoch: int, done: int, *, lr: float, votes: dict[str, bool]) -> None:
        """Begin to average the steps since the last reduction over all ranks, while the device goes on.

        Args:
            epoch, done: of the run, for the record and the progress bar.
            lr: learning rate, for the record.
            votes: of this rank, the same names on every rank: whether to stop, say.
        """
        names = list(self._pending[-1][2])
        local = torch.stack([torch.stack([values[name] for name in names]) for _, _, values in self._pending])
        # One collective for the metrics and the votes.
        cast = [torch.full((len(local), 1), float(vote), device=local.device) for vote in votes.values()]
        table = torch.cat([local, *cast], dim=1)
        read = begin_to_read(lambda: table, begin_all_reduce_sum(table, self.world.group), self.world.device)
        self._reduction = _Reduction(read, local, self._pending, [*names, *votes], epoch, done, lr)
        self._pending = []

    def end_reduction(self) -> dict[str, bool] | None:
        """Record what the last reduction found: the last of its steps. Waits for those, but not for later ones.

        Returns:
            For every vote whether any rank had it; None if no reduction was under way.

        Raises:
            NonFiniteError: on every rank, if any rank's loss was not finite, or a gradient.
        """
        if self._reduction is None:
            return None
        (read, local, steps, names, epoch, done, lr), self._reduction = self._reduction, None
        width = local.shape[1]
        table = torch.tensor(read()) / self.world.size
        votes = dict(zip(names[width:], (table[-1, width:] > 0).tolist(), strict=True))
        self._check_finite(table, local, steps, names)
        kept = [column for column, name in enumerate(names[:width]) if name != FINITE]
        if self._names != (found := [names[column] for column in kept]):
            self._epoch.clear()  # a checkpoint within the epoch was of a version with other metrics
            self._names = found
        self._epoch += list(table[:, kept])
        values = self._named(self._epoch[-1])
        self.recorder.row("step", steps[-1][0], epoch, **values, lr=lr)
        self.recorder.advance(done, values, self.batch_size)
        return votes

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

    def _check_finite(self, table: torch.Tensor, local: torch.Tensor, steps: list[_Step], names: list[str]) -> None:
        loss, finite = names.index("loss"), names.index(FINITE)
        bad = (~table[:, loss].isfinite() | (table[:, finite] < 1)).nonzero().view(-1)
        if not len(bad):
            return
        first = int(bad[0])
        step, index, _ = steps[first]
        if local[first, loss].isfinite() and not table[first, loss].isfinite():
            raise NonFiniteError(f"the loss of step {step} is not finite on another rank, which names the images")
        what = f"the loss of step {step} is {local[first, loss].item()}"
        if local[first, loss].isfinite():  # after the all-reduce nobody knows whose gradient it was
            what = f"a gradient of step {step} is not finite, on this rank or another, though the loss is"
        indices = index.tolist()
        raise NonFiniteError(
            f"{what}; that step was not applied and the last checkpoint stands. The batch's images are {indices}, the "
            f"first of them {self.images.name(indices[0])}. {DIVERGED}"
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


def describe(values: dict[str, float]) -> str:
    """ "loss 3.142, instance 7.1, ..." """
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


def _brief(values: dict[str, float], metrics: dict[str, Metric]) -> str:
    """The values panel by panel, "9.31 7.12 2.19, 35 40 %", short enough for a terminal of 80 columns."""
    panels: dict[str, list[str]] = {}
    for name, metric in metrics.items():
        if name in values:
            panels.setdefault(metric.panel, []).append(f"{values[name]:.3g}")
    parts = (f"{' '.join(numbers)}{' %' if panel.endswith('%') else ''}" for panel, numbers in panels.items())
    return ", ".join(parts)


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value
