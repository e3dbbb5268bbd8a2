"""What a task of evaluation is to the command: options in, a table out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from pcl_fast.config import DataConfig
from pcl_fast.data import ImageSet, check_headers
from pcl_fast.distributed import World, all_or_none, check_same, main_first, shard_bounds
from pcl_fast.evaluation.continuation import Continuation
from pcl_fast.evaluation.features import Features, encode_set
from pcl_fast.evaluation.labelled import Labelled, open_labelled, open_training
from pcl_fast.pretrained import Pretrained


@dataclass(frozen=True)
class Row:
    """A row of a table: whose scores they are, and a score (or None) for every column."""

    name: str
    scores: tuple[float | None, ...]


@dataclass(frozen=True)
class Outcome:
    """What a task has found.

    protocol: sentences that say exactly what was done: a reader could do it again.
    columns: the scores' names.
    rows: this encoder's scores.
    paper: the paper's scores for the same columns.
    draw: draws the picture.
    digits: how many of the scores' digits behind the point the table shows.
    details: what else evaluation/TASK.json is to hold, of plain values.
    """

    protocol: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Row]
    paper: Sequence[Row]
    draw: Callable[[Figure], None]
    digits: int = 1
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of all tasks."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run's folder or one of its checkpoints, an official PCL or MoCo file, or the weights of a torchvision or timm
    ResNet."""
    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The labelled images."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the scores and the picture; None: `evaluation` beside the checkpoint."""
    encoder: Literal["query", "momentum"] | None = None
    """Which of the checkpoint's encoders is scored; None: the one that this task's protocol takes, or the only one that
    there is."""
    size: int | None = None
    """Side of the crops, in pixels; None: what the encoder was trained with, or 224."""
    resize: int | None = None
    """The shorter side is resized to this before a centre crop; None: what the encoder was trained with, or 256/224 of
    another size."""
    format: Literal["folder", "webdataset"] = "folder"
    """How images lie on disk, as in pcl_fast.train."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """What decodes and crops; auto is DALI wherever it can be imported."""
    workers: int | None = None
    """Threads or processes per rank that read and decode, as in pcl_fast.train."""
    cache: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Keep the centre crops in this folder, as in pcl_fast.train, where other tasks find them again."""
    seed: int = 0
    """Of everything that is drawn."""


@dataclass(frozen=True, kw_only=True)
class Task(Options, ABC):
    """A task: its fields are the command line's flags, `run` does the work on all ranks together.

    A subclass gives its name on the command line and the encoder that it scores unless it is told otherwise:
    `class Knn(Task, name="knn", scores="momentum")`.
    """

    named: ClassVar[dict[str, type[Task]]] = {}

    def __init_subclass__(cls, *, name: str, scores: Literal["query", "momentum"]) -> None:
        super().__init_subclass__()
        cls.name, cls.scores = name, scores
        Task.named[name] = cls

    @classmethod
    @abstractmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        """Say why `evaluate all` leaves this task out for such data, or return None if it can run. It looks at what is
        there and reads no image.
        """

    @classmethod
    def among_all(cls, **given: Any) -> Task:
        """Return this task as `evaluate all` runs it, with the flags that all tasks share."""
        return cls(**given)

    def check(self) -> None:
        """Refuse options that cannot work, before anything is read.

        Raises:
            ValueError: names the flag, its value and what to use instead.
        """

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Do the work. All ranks call it together; the main one's result counts.

        Raises:
            ValueError, UserError, OSError: the data or the options cannot be used; before long work.
            Stopped: a signal came, and what was done is saved, see Continuation.
        """

    def reading(self, pretrained: Pretrained) -> DataConfig:
        """Return how images are read and cropped, `resize` included.

        Raises:
            ValueError: the encoder does not take images of this size.
        """
        options = {"loader": self.loader, "workers": self.workers, "cache": self.cache}
        data = pretrained.reading(self.size, root=self.data, format=self.format, **options)
        return replace(data, resize=self.resize or data.shorter_side)

    def settings(self) -> dict[str, Any]:
        """Return all options as plain values."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class Context:
    """What a task works with.

    world: the ranks.
    pretrained: the encoder to score, on this rank's device, in eval mode.
    read: reads an encoder of another checkpoint, (path, "query" or "momentum") -> Pretrained on this rank's device.
    output: the folder of the results, which exists.
    continuation: where a task that was stopped goes on.
    """

    world: World
    pretrained: Pretrained
    read: Callable[[Path, str], Pretrained]
    output: Path
    continuation: Continuation
    console: Console

    @property
    def device(self) -> torch.device:
        """Return this rank's device."""
        return self.world.device

    def labelled(self, folder: Path, format: str) -> Labelled:
        """Open training and test images, see `open_labelled`, and look at all of their headers.

        Raises:
            ImageError: on all ranks, if one finds a fault, or the results' folder lies among the images.
        """
        found = main_first(lambda: open_labelled(folder, format, self.output), self.world)
        for images in (found.train, found.test):
            self.look_at(images)
        return found

    def training(self, folder: Path, format: str) -> tuple[ImageSet, torch.Tensor]:
        """Open training images, see `open_training`, and look at all of their headers.

        Raises:
            ImageError: on all ranks, if one finds a fault, or the results' folder lies among the images.
        """
        images, labels = main_first(lambda: open_training(folder, format, self.output), self.world)
        self.look_at(images)
        return images, labels

    def look_at(self, images: ImageSet) -> None:
        """Read the headers of all images, a share on each rank: better now than after hours.

        Raises:
            ImageError: one of them is missing or no image; names it, on all ranks.
        """
        check_same("the images", images.fingerprint(), self.world, advice="--data must hold the same on every machine")
        all_or_none(lambda: check_headers(images, self.world.rank, self.world.size), self.world)

    def say(self, text: str) -> None:
        """Print a line, on the main rank."""
        self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar for long work where there is a terminal; gives a function to call with how much is done."""
        if not self.console.is_terminal:
            yield lambda done: None
            return
        with Progress(console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)

    def encode(self, images: ImageSet, data: DataConfig, what: str) -> Features:
        """Encode this rank's shard of the centre crops of `images`, with a bar that says `what` they are."""
        begin, end = shard_bounds(len(images), self.world.rank, self.world.size)
        with self.progress(f"encoding {what}", end - begin) as progress:
            return encode_set(self.pretrained, images, data, self.world, progress)
