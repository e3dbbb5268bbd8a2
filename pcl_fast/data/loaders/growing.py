"""The loaders of a run whose crops may grow over the epochs (DataConfig.sizes): made anew for another size."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch

from pcl_fast.augmentations import View
from pcl_fast.config import DataConfig
from pcl_fast.crop_sizes import in_proportion
from pcl_fast.data.batch import Batch
from pcl_fast.data.loaders.loader import TrainingLoader, clustering_loader, training_loader
from pcl_fast.data.sources.images import ImageSet
from pcl_fast.distributed import World
from pcl_fast.errors import UserError

T = TypeVar("T")


class _Current(Generic[T]):
    """What is made for the size of one epoch at a time."""

    def __init__(self, make: Callable[[DataConfig], T], config: DataConfig):
        self._make, self._config = make, config
        self._for = config.at(0)
        self._made: T | None = make(self._for)

    def at(self, epoch: int) -> T:
        wanted = self._config.at(epoch)
        if wanted != self._for:
            # Its threads, processes and memory go first; DALI's lie in cycles.
            self._made = None
            gc.collect()
            self._made, self._for = self._make(wanted), wanted
        return self._made


class GrowingLoader:
    """A training loader whose views have the size of their epoch. What else is drawn of them does not depend on it."""

    def __init__(self, images: ImageSet, config: DataConfig, *, views: Sequence[View], **options: Any):
        """
        Args:
            views: as they are at config.size; those of other sizes are in proportion.
            options: what else `training_loader` takes, which says what it raises.
        """

        def make(sized: DataConfig) -> TrainingLoader:
            at_size = [replace(view, size=in_proportion(view.size, sized.size, config.size)) for view in views]
            return training_loader(images, sized, views=at_size, **options)

        self._loader = _Current(make, config)
        self.steps = self._loader.at(0).steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from step `first_step` on; those before it cost nothing."""
        return self._loader.at(epoch).epoch(epoch, first_step)


class GrowingView:
    """The clustering view of this rank's shard, at the size of an epoch. See `clustering_loader` for arguments and
    errors, which are raised for the first epoch's size alone: if there is no room for a later one's cache, a warning
    says so and it is decoded every time.
    """

    def __init__(self, images: ImageSet, config: DataConfig, *, batch_size: int, world: World):
        self._images, self._options = images, {"batch_size": batch_size, "world": world}
        self._first = config.at(0)
        self._loader = _Current(self._make, config)

    def _make(self, sized: DataConfig) -> Iterable[torch.Tensor]:
        try:
            return clustering_loader(self._images, sized, **self._options)
        except UserError as error:
            if sized.cache is None or sized == self._first:
                raise
            warnings.warn(f"{error} The clustering view of {sized.size} px is decoded every time", stacklevel=2)
            return clustering_loader(self._images, replace(sized, cache=None), **self._options)

    def at(self, epoch: int) -> Iterable[torch.Tensor]:
        """What `clustering_loader` returns for the epoch's size."""
        return self._loader.at(epoch)
