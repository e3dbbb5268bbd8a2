"""When a run does what, and how many images at a time: the trainer and the planner ask the same functions.

`epoch` counts from 0. Asked of `epoch == config.epochs`, they answer for the E-step after the last epoch.
"""

from __future__ import annotations

from collections import Counter

import torch

from pcl_fast.config import Config, DataConfig

# Images at a time of the pass that fills the feature shard. As many lie in memory decoded but not yet cropped, in each
# stage of the loader: 2.3 GB for photographs of 12 megapixels. A GPU encodes more at a time: with 64 a V100 reaches
# 0.88 of its speed with 256 (NVIDIA's figures for inference).
CLUSTERING_BATCH, ENCODED_ON_GPU = 64, 256


def clusters_before(config: Config, epoch: int) -> bool:
    """Whether the images are clustered before this epoch: there are granularities and warm-up is over."""
    return bool(config.cluster.ks) and epoch >= config.cluster.warmup_epochs


def evaluates_before(config: Config, epoch: int) -> bool:
    """Whether the features are evaluated before this epoch, given labels: every n-th time and after the last epoch."""
    every = config.evaluation.every
    return every > 0 and (epoch == config.epochs or epoch % every == 0)


def rank_batch(config: Config, ranks: int) -> int:
    """Images per step of each of `ranks` ranks, among which the batch divides."""
    return config.optim.batch_size // ranks


def part_batch(config: Config, ranks: int) -> int:
    """Images that each of `ranks` ranks encodes at a time: a step's, or one of its parts where it accumulates."""
    return rank_batch(config, ranks) // config.optim.accumulate


def steps_left(config: Config, steps: int, done: int) -> Counter[DataConfig]:
    """Steps that a run of `steps` an epoch has left after the first `done`, by what their crops are."""
    left: Counter[DataConfig] = Counter()
    for epoch in range(done // steps, config.epochs):
        left[config.data.at(epoch)] += steps if epoch > done // steps else steps - done % steps
    return left


def encoded_at_a_time(device: torch.device) -> int:
    """Images that a pass over a data set encodes at a time."""
    return ENCODED_ON_GPU if device.type == "cuda" else CLUSTERING_BATCH


def check_sizes(config: Config, images: int, ranks: int, *, labelled: bool = True) -> None:
    """Refuse a data set, or a number of ranks, that does not fit the recipe; for every method.

    labelled: whether the images have labels, without which nothing is evaluated.

    Raises:
        ValueError: names both numbers and the flag.
    """
    batch = config.optim.batch_size
    if batch % ranks:
        raise ValueError(f"--optim.batch-size {batch} does not divide among {ranks} ranks; use a multiple of {ranks}")
    if batch > images:
        raise ValueError(f"--optim.batch-size {batch} is larger than the data set of {images} images; make it smaller")
    _check_parts(config, ranks)
    most = max(config.evaluation.ks, default=0)
    if labelled and config.evaluation.every and most > images:
        raise ValueError(f"cannot make {most} clusters of {images} images; set --evaluation.ks to smaller numbers")


def _check_parts(config: Config, ranks: int) -> None:
    batch, parts, rows = config.optim.batch_size, config.optim.accumulate, rank_batch(config, ranks)
    if parts == 1:
        return
    whose = (
        f"a rank's batch of {rows} images (--optim.batch-size {batch} on {ranks} {'ranks' if ranks > 1 else 'rank'})"
    )
    if rows % parts:
        raise ValueError(
            f"--optim.accumulate {parts} does not divide {whose}; use a divisor of it, or an --optim.batch-size that "
            f"is a multiple of {parts * ranks}"
        )
    if rows == parts:
        raise ValueError(
            f"--optim.accumulate {parts} makes parts of a single image of {whose}, in which batch norm has no batch to "
            f"take statistics of; use fewer parts"
        )
