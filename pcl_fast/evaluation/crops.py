"""The features of random views, for classifiers that learn from several views of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from pcl_fast.augmentations import View
from pcl_fast.config import DataConfig
from pcl_fast.data import Batch, ImageSet, training_loader
from pcl_fast.distributed import World
from pcl_fast.evaluation.features import FrozenBackbone
from pcl_fast.schedule import encoded_at_a_time


@torch.inference_mode()
def encode_views(
    encode: FrozenBackbone,
    images: ImageSet,
    data: DataConfig,
    view: View,
    count: int,
    *,
    seed: int,
    world: World,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode `count` random views of every image, the ranks dividing the images among them.

    Args:
        encode: on this rank's device.
        images: the whole data set.
        data: how to read.
        view: the views' augmentation.
        count: of an image's views, which differ.
        seed: of the views.
        world: the ranks.
        progress: is told how many of this rank's images are done.

    Returns:
        (features [n_local, width], float32 on a CPU and float16 on a GPU; positions in the data set, int64 [n_local] on
        the CPU).
    """
    dtype = torch.float16 if world.device.type == "cuda" else torch.float32
    features, positions, done = [], [], 0
    for batch in _in_turn(images, data, (view,) * count, seed, world):
        new = batch.index < len(images)
        on_device = new.to(world.device)
        features += [encode(views)[on_device].to(dtype) for views in batch.views]
        positions += [batch.index[new]] * count
        done += len(batch.index)
        progress(done)
    return torch.cat(features), torch.cat(positions)


def _in_turn(images: ImageSet, data: DataConfig, views: tuple[View, ...], seed: int, world: World) -> Iterator[Batch]:
    """Return batches of all images once. Those that fill up the last batch have positions behind the data set's end."""
    rows = encoded_at_a_time(world.device)
    rows = min(rows, -(-len(images) // world.size))
    together = rows * world.size
    padded = -(-len(images) // together) * together
    filled = images.subset([position % len(images) for position in range(padded)])
    loader = training_loader(
        filled, data, views=views, batch_size=rows, seed=seed, world=world, order=lambda epoch: np.arange(padded)
    )
    return loader.epoch(0)
