"""Loaders built on torchvision: shuffled pairs of views for training, the data set in order for clustering."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pcl_fast.config import DataConfig
from pcl_fast.data.folder import ImageFolder
from pcl_fast.data.views import View, clustering_view, training_view
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.seeds import mix_seeds


class Batch(NamedTuple):
    """query_view, key_view: uint8 [N, 3, H, W]; index: int64 [N], positions in the data set."""

    query_view: torch.Tensor
    key_view: torch.Tensor
    index: torch.Tensor


class _Pairs(Dataset):
    """Item (epoch, index): two views whose randomness depends on nothing but seed, epoch and index.

    So the views are the same for any number of ranks and workers, and after any interruption.
    """

    def __init__(self, folder: ImageFolder, view: View, seed: int):
        self.folder, self.view, self.seed = folder, view, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        epoch, index = key
        image = self.folder.read(index)
        # Not torch.manual_seed, which formats a stack trace for every GPU that is not initialised yet (0.3 ms).
        torch.default_generator.manual_seed(mix_seeds(self.seed, epoch, index))
        return self.view(image), self.view(image), index


class _InOrder(Dataset):
    """Clustering views of images `begin` to `end`."""

    def __init__(self, folder: ImageFolder, view: View, begin: int, end: int):
        self.folder, self.view, self.begin, self.end = folder, view, begin, end

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.view(self.folder.read(self.begin + position))


class TrainingLoader:
    """Every epoch a global shuffle, the same on all ranks, of which each rank reads its own disjoint share.

    The batch that all ranks form together at a step does not depend on their number. The last images that do not
    fill a global batch are dropped, others every epoch.
    """

    def __init__(self, folder: ImageFolder, config: DataConfig, *, batch_size: int, seed: int, world: World):
        """batch_size: images per rank and step."""
        self.batch_size = batch_size
        self._sampler = DistributedSampler(
            folder, num_replicas=world.size, rank=world.rank, shuffle=True, seed=seed, drop_last=True
        )
        self.steps = len(folder) // (batch_size * world.size)
        self._batches = _EpochBatches(self._sampler, batch_size, self.steps)
        self._loader = DataLoader(
            _Pairs(folder, training_view(config), seed),
            batch_sampler=self._batches,
            **_workers(config, world),
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step `first_step` on; those before it cost nothing."""
        self._sampler.set_epoch(epoch)
        self._batches.first_step = first_step
        for query_view, key_view, index in self._loader:
            yield Batch(query_view, key_view, index)


class _EpochBatches:
    """Lists of (epoch, index), one per step."""

    def __init__(self, sampler: DistributedSampler, batch_size: int, steps: int):
        self.sampler, self.batch_size, self.steps, self.first_step = sampler, batch_size, steps, 0

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, epoch = list(self.sampler), self.sampler.epoch
        for step in range(self.first_step, self.steps):
            begin = step * self.batch_size
            yield [(epoch, index) for index in order[begin : begin + self.batch_size]]


def clustering_loader(folder: ImageFolder, config: DataConfig, *, batch_size: int, world: World) -> DataLoader:
    """This rank's shard of the clustering view in the data set's order: uint8 [N, 3, H, W], the last batch smaller."""
    begin, end = shard_bounds(len(folder), world.rank, world.size)
    return DataLoader(
        _InOrder(folder, clustering_view(config), begin, end),
        batch_size=batch_size,
        **_workers(config, world, prefetch=2),  # batches are large, and lie in shared memory
    )


def _workers(config: DataConfig, world: World, prefetch: int = 4) -> dict:
    pin = world.device.type == "cuda"
    if config.workers == 0:
        return {"num_workers": 0, "pin_memory": pin}
    return {
        "num_workers": config.workers,
        "pin_memory": pin,
        "persistent_workers": True,
        "prefetch_factor": prefetch,
        "worker_init_fn": _leave_process_group,
    }


def _leave_process_group(worker: int) -> None:
    """torchrun and terminals signal the trainer's whole process group; a worker that died of it would bring the trainer
    down before it has saved. (Ignoring the signals instead would keep workers from being ended at exit.)
    """
    os.setpgid(0, 0)
