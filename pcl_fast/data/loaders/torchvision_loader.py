"""Loaders built on PIL, torchvision and worker processes: they run everywhere, and show what DALI must make."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pcl_fast.augmentations import View
from pcl_fast.config import DataConfig
from pcl_fast.data.batch import Batch
from pcl_fast.data.loaders.order import EpochOrder
from pcl_fast.data.loaders.resources import Resources
from pcl_fast.data.sources.images import ImageSet
from pcl_fast.data.views.draws import draw_views
from pcl_fast.data.views.pil import clustering_view, training_view
from pcl_fast.errors import ImageError


class TrainingLoader:
    """A training loader makes the views of all images, in a new order every epoch."""

    def __init__(self, images: ImageSet, views: Sequence[View], order: EpochOrder, resources: Resources):
        self.order, self.resources = order, resources
        self.steps = order.steps
        self._batches = EpochBatches(order)
        self._loader = DataLoader(
            _Shuffled(images, views, order.seed),
            batch_sampler=self._batches,
            **worker_options(resources, resources.prefetch),
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from step `first_step` on; those before it cost nothing."""
        self._batches.epoch, self._batches.first_step = epoch, first_step
        for views, index in without_stacks(self._loader):
            yield Batch(tuple(_moved(view, self.resources) for view in views), index)


class ClusteringLoader:
    """A clustering loader makes the clustering view of a range of images, in order; its last batch is smaller."""

    def __init__(
        self,
        images: ImageSet,
        config: DataConfig,
        shard: range,
        resources: Resources,
        *,
        batch_size: int,
    ):
        self.resources, self.length, self.batch_size = resources, len(shard), batch_size
        self._batches = _Ranges(len(shard), batch_size)
        # Two batches ahead are enough: they are large here, and lie in shared memory.
        self._loader = DataLoader(
            _InOrder(images, config, shard), batch_sampler=self._batches, **worker_options(resources, 2)
        )

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.batches(range(0, self.length, self.batch_size))

    def batches(self, starts: Iterable[int]) -> Iterator[torch.Tensor]:
        """Yield the batches that begin at these positions of the shard, which are asked for while it works."""
        self._batches.starts = starts
        for view in without_stacks(self._loader):
            yield _moved(view, self.resources)


class _Shuffled(Dataset):
    """The training views: item (epoch, index) is (the views of an image, uint8 [size, size, 3] each; index)."""

    def __init__(self, images: ImageSet, views: Sequence[View], seed: int):
        self.images, self.views, self.seed = images, views, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[torch.Tensor], int]:
        epoch, index = key
        image = self.images.read(index)
        return [self._view(image, view, epoch, number, index) for number, view in enumerate(self.views)], index

    def _view(self, image: Image.Image, view: View, epoch: int, number: int, index: int) -> torch.Tensor:
        sizes = np.array([[image.height, image.width]])
        draws = draw_views(view, sizes, seed=self.seed, epoch=epoch, number=number, index=np.array([index]))
        return training_view(image, draws, 0, view.size)


class _InOrder(Dataset):
    """The clustering views of a range of images: an item is uint8 [size, size, 3]."""

    def __init__(self, images: ImageSet, config: DataConfig, shard: range):
        self.images, self.config, self.shard = images, config, shard

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, position: int) -> torch.Tensor:
        return clustering_view(self.images.read(self.shard[position]), self.config.shorter_side, self.config.size)


class _Ranges:
    """The items of batches of a shard: a list of positions for each of `starts`, which may be set before every pass."""

    def __init__(self, length: int, batch_size: int):
        self.length, self.batch_size = length, batch_size
        self.starts: Iterable[int] = ()

    def __iter__(self) -> Iterator[range]:
        for start in self.starts:
            yield range(start, min(start + self.batch_size, self.length))


class EpochBatches:
    """The items of an epoch's batches: a list of (epoch, index) for every step from `first_step` on. Both may be set
    before every epoch.
    """

    def __init__(self, order: EpochOrder):
        self.order, self.epoch, self.first_step = order, 0, 0

    def __len__(self) -> int:
        return self.order.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for indices in self.order.batches(epoch, self.first_step):
            yield [(epoch, index) for index in indices.tolist()]


def without_stacks(loader: DataLoader) -> Iterator[Any]:
    """Yield a DataLoader's batches.

    Raises:
        ImageError: an image cannot be used. A worker's error comes with its stack, which is left out.
    """
    try:
        batches = iter(loader)
        _end_workers_at_exit(loader)
        yield from batches
    except ImageError as error:
        raise ImageError(str(error).rpartition(f"{ImageError.__module__}.ImageError: ")[2].rstrip()) from None


_ending: weakref.WeakSet[DataLoader] = weakref.WeakSet()


def _end_workers_at_exit(loader: DataLoader) -> None:
    """Tell a loader's workers to end before the process does.

    With pinned memory PyTorch waits for them at exit without having told them: five seconds for each, one after the
    other. What is registered last comes first, so this must come after the workers have begun.
    """
    if loader.num_workers and loader not in _ending:
        _ending.add(loader)
        atexit.register(_end_workers, weakref.ref(loader))


def _end_workers(reference: weakref.ref[DataLoader]) -> None:
    loader = reference()
    if loader is not None and loader._iterator is not None:
        loader._iterator._shutdown_workers()


def _moved(view: torch.Tensor, resources: Resources) -> torch.Tensor:
    return view if resources.gpu is None else view.to(resources.gpu, non_blocking=True)


def worker_options(resources: Resources, prefetch: int) -> dict:
    """Return the options of a DataLoader whose worker processes outlive an epoch, and a signal to the trainer."""
    options = {
        "num_workers": resources.workers,
        "pin_memory": resources.gpu is not None,
        # Whenever it is iterated a DataLoader draws a seed for its workers, which need none here. Taken from PyTorch's
        # own generator, it would let a run that begins an epoch twice, because it was stopped within it, draw other
        # numbers from there on.
        "generator": torch.Generator(),
    }
    if resources.workers == 0:
        return options
    return {
        **options,
        "persistent_workers": True,
        "prefetch_factor": prefetch,
        "worker_init_fn": _begin_worker,
    }


def _begin_worker(worker: int) -> None:
    """Move a worker to a process group of its own, where a signal means what it does to any process: it has inherited
    the trainer's handlers, which would raise what the trainer alone understands.

    torchrun and terminals signal the trainer's whole process group; a worker that died of it would bring the trainer
    down before it has saved. (Ignoring the signals instead would keep workers from being ended at exit.)
    """
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.excepthook = _quiet_without_trainer(sys.excepthook)


def _quiet_without_trainer(show: Callable[..., None]) -> Callable[..., None]:
    """Where the trainer was killed in the midst of taking an image over, the thread that hands it over would print its
    stack. The worker ends without that.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, (EOFError, ConnectionError)):
            show(kind, error, trace)

    return hook
