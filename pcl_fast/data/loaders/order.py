"""Which images a rank sees at which step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pcl_fast.distributed import World
from pcl_fast.seeds import Purpose, mix_seeds


class EpochOrder:
    """Every epoch a global shuffle, the same on all ranks, of which each rank takes its own disjoint share.

    The batch that all ranks form together at a step does not depend on their number. The last images that do not
    fill a global batch are dropped, others every epoch. An epoch's order follows from its number alone, so that a run
    can go on at any step.
    """

    def __init__(self, images: int, *, batch_size: int, seed: int, world: World):
        """
        Args:
            images: in the data set.
            batch_size: images per rank and step.
        """
        self.images, self.batch_size, self.seed, self.world = images, batch_size, seed, world
        self.steps = images // (batch_size * world.size)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[np.ndarray]:
        """int64 [batch_size] indices for every step of the epoch from `first_step` on."""
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, Purpose.ORDER, epoch))
        order = torch.randperm(self.images, generator=generator).numpy()
        share = order[self.world.rank :: self.world.size]
        for step in range(first_step, self.steps):
            yield share[step * self.batch_size : (step + 1) * self.batch_size]
