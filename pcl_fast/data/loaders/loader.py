"""Choosing and building the loaders of a run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Protocol

import numpy as np
import torch

from pcl_fast.augmentations import View
from pcl_fast.config import DataConfig
from pcl_fast.crop_sizes import describe_stages
from pcl_fast.data.batch import Batch
from pcl_fast.data.loaders.cache import cached
from pcl_fast.data.loaders.memory import leave_room
from pcl_fast.data.loaders.order import EpochOrder
from pcl_fast.data.loaders.resources import Resources, pick_resources
from pcl_fast.data.sources.images import ImageSet
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.errors import MissingPackageError
from pcl_fast.kernels.photometric_plain import MAX_SIGMA


class TrainingLoader(Protocol):
    """A training loader makes batches of random views, in a new order every epoch.

    steps: batches per epoch and rank.
    """

    steps: int

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from step `first_step` on; those before it cost nothing."""


def training_loader(
    images: ImageSet,
    config: DataConfig,
    *,
    views: Sequence[View],
    batch_size: int,
    seed: int,
    world: World,
    order: Callable[[int], np.ndarray | None] = lambda epoch: None,
) -> TrainingLoader:
    """Build the loader of shuffled images and their random views, see EpochOrder and draw_views.

    Args:
        images: the data set, the same on all ranks.
        config: says which loader, and what it may use of the machine.
        views: what Batch.views will hold, made of every image from one decoding. They may differ in everything.
        batch_size: images per rank and step.
        seed: of order and views, the same on all ranks.
        order: gives an epoch's images where they are not simply shuffled, see EpochOrder.

    Raises:
        ValueError: a view's blur is wider than the kernels can make it.
        MissingPackageError: config.loader is dali, which cannot be imported.
        UserError: DALI does not run on this machine.
    """
    for view in views:
        if view.sigma[1] > MAX_SIGMA:
            raise ValueError(f"a view's blur can have a sigma of at most {MAX_SIGMA} pixels, got {view.sigma[1]}")
    resources = pick_resources(config, world.device)
    order = EpochOrder(len(images), batch_size=batch_size, seed=seed, world=world, given=order)
    images = leave_room(images, config, world)
    return _implementation(config).TrainingLoader(images, views, order, resources)


def clustering_loader(images: ImageSet, config: DataConfig, *, batch_size: int, world: World) -> Iterable[torch.Tensor]:
    """Build the loader of this rank's shard of the clustering view, in the data set's order.

    It may be iterated any number of times, and yields uint8 [batch_size, size, size, 3] on the encoder's device; its
    last batch is smaller. With config.cache the images are decoded only the first time.

    Raises:
        MissingPackageError: config.loader is dali, which cannot be imported.
        UserError: DALI does not run on this machine, or config.cache cannot be written or has no room.
    """
    resources = pick_resources(config, world.device)
    shard = range(*shard_bounds(len(images), world.rank, world.size))
    images = leave_room(images, config, world)
    loader = _implementation(config).ClusteringLoader(images, config, shard, resources, batch_size=batch_size)
    if config.cache is None:
        return loader
    made_by = _maker(config, resources)
    return cached(loader, images, config, world, made_by=made_by, batch_size=batch_size, gpu=resources.gpu)


def describe_loader(config: DataConfig, world: World) -> str:
    """Say in one line for the log which loader is used, and what it uses of the machine."""
    loader, resources = pick_loader(config.loader), pick_resources(config, world.device)
    ahead = f"{resources.prefetch} batches ahead"
    more = "" if config.cache is None else f"; clustering view cached in {config.cache}"
    more += f"; {describe_stages(config.sizes, config.size)}" if config.sizes else ""
    if loader == "torchvision":
        return f"images: torchvision, {resources.workers} processes, {ahead} of each{more}"
    where = f"GPU with {resources.decoder_mib} MiB a thread" if resources.decodes_on_gpu else "CPU"
    return f"images: dali, {resources.threads} threads, {ahead}, decoding on the {where}{more}"


def _maker(config: DataConfig, resources: Resources) -> str:
    """Name the loader as far as it determines a view's bytes, for GPUs have different decoders."""
    pillow = f"Pillow {version('pillow')}"
    if pick_loader(config.loader) == "torchvision":
        return f"torchvision {version('torchvision')}, {pillow}"
    where = "the CPU" if resources.gpu is None else torch.cuda.get_device_name(resources.gpu)
    where += ", decoded by the CPU" if resources.gpu is not None and not resources.decodes_on_gpu else ""
    return f"DALI {importlib.import_module('nvidia.dali').__version__} on {where}, {pillow}"


def _implementation(config: DataConfig) -> ModuleType:
    return importlib.import_module(f"pcl_fast.data.loaders.{pick_loader(config.loader)}_loader")


def pick_loader(loader: str) -> str:
    """Return "dali" or "torchvision": the loader that is asked for, or for "auto" dali where it can be imported.

    Raises:
        MissingPackageError: dali is asked for and cannot be imported.
    """
    if loader == "torchvision":
        return loader
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        if loader == "dali":
            raise MissingPackageError(
                f"--data.loader dali wants NVIDIA DALI ({error}): pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 "
                "for Volta), or use --data.loader torchvision"
            ) from error
        return "torchvision"
    return "dali"
