"""The queue: momentum keys of earlier batches, which are the negatives of InfoNCE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class KeyQueue(nn.Module):
    """The last `size` momentum keys [size, dim], in a ring that begins with random unit vectors.

    Any number of keys may be enqueued at a time; of more than `size` the last ones are kept.
    """

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1).to(dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Replace the oldest keys by `keys` [B, dim]. Nothing waits for the device, where the ring's position lies."""
        size = len(self.keys)
        skipped = max(0, len(keys) - size)
        keys = keys[skipped:]
        slots = (self.position + skipped + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.position.add_(skipped + len(keys)).remainder_(size)
