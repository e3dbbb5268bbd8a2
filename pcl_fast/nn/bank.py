"""The bank: of every image the last key or embedding, which the E-step clusters instead of features made for it."""

from __future__ import annotations

import torch
from torch import nn

from pcl_fast.distributed import World, all_reduce_sum, shard_bounds


class KeyBank(nn.Module):
    """The last key of every image of the data set, [images, dim] in its order, the same on all ranks.

    Every rank keeps all of it: all ranks' keys come to every rank anyway, for the queue, and only their 8 bytes of
    index are sent besides. A rank that kept its own shard alone would save memory (of the 328 MB of ImageNet in
    float16), but every checkpoint would have to gather the shards, through a GPU's memory, and another number of ranks
    to divide them anew.
    """

    def __init__(self, images: int, dim: int, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("keys", torch.zeros(images, dim, dtype=dtype))

    @torch.no_grad()
    def fill(self, features: torch.Tensor, world: World) -> None:
        """Begin anew with every rank's features [n_local, dim] of its shard.

        The shards meet as a sum in which all but one addend are 0: in place, where a gather would take as much memory
        again.
        """
        self.keys.zero_()
        self.shard(world).copy_(features)
        all_reduce_sum(self.keys, world.group)

    @torch.no_grad()
    def put(self, keys: torch.Tensor, index: torch.Tensor) -> None:
        """Replace the keys of the images `index` (int64 [N], each once) by `keys` [N, dim]."""
        self.keys.index_copy_(0, index, keys.to(self.keys.dtype))

    def shard(self, world: World) -> torch.Tensor:
        """The keys [n_local, dim] of this rank's shard, in the bank's own memory."""
        begin, end = shard_bounds(len(self.keys), world.rank, world.size)
        return self.keys[begin:end]
