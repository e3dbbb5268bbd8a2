"""Which images a rank sees at which step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from pcl_fast.distributed import World
from pcl_fast.seeds import Purpose, mix_seeds


class EpochOrder:
    """Every epoch a global shuffle, the same on all ranks, of which each rank takes its own disjoint share.

    The batch that all ranks form together at a step does not depend on their number: its images are dealt out to the
    ranks like cards. The last images that do not fill a global batch are dropped, others every epoch. An epoch's order
    follows from its number alone, so that a run can go on at any step.
    """

    def __init__(
        self,
        images: int,
        *,
        batch_size: int,
        seed: int,
        world: World,
        given: Callable[[int], np.ndarray | None] = lambda epoch: None,
    ):
        """
        Args:
            images: in the data set.
            batch_size: images per rank and step.
            given: an epoch's order, int64 positions in the data set, instead of a shuffle; the same on all ranks, and
                as many as fill the epoch's steps. They may come more than once. None: shuffle.
        """
        self.images, self.batch_size, self.seed, self.world, self.given = images, batch_size, seed, world, given
        self.steps = images // (batch_size * world.size)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[np.ndarray]:
        """Yield int64 [batch_size] positions for every step of the epoch from `first_step` on.

        Raises:
            ValueError: the order given is too short for the epoch, or leaves the data set.
        """
        share = self._order(epoch)[self.world.rank :: self.world.size]
        for step in range(first_step, self.steps):
            yield share[step * self.batch_size : (step + 1) * self.batch_size]

    def _order(self, epoch: int) -> np.ndarray:
        order = self.given(epoch)
        if order is None:
            generator = torch.Generator().manual_seed(mix_seeds(self.seed, Purpose.ORDER, epoch))
            return torch.randperm(self.images, generator=generator).numpy()
        wanted = self.steps * self.batch_size * self.world.size
        if len(order) < wanted or order.min() < 0 or order.max() >= self.images:
            raise ValueError(
                f"an epoch's order must be {wanted} positions or more, each in [0, {self.images}); got {len(order)}"
                + (f" from {order.min()} to {order.max()}" if len(order) else "")
            )
        return order
