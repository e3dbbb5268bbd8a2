"""The queue of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class KeyQueue(nn.Module):
    """The last `size` momentum keys, [size, dim], in a ring. Starts with random unit vectors.

    Takes any number of keys at a time: it wraps, and of more than `size` keeps the last.
    """

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1).to(dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Replace the oldest keys by `keys` [B, dim]. Without waiting for the device: the position lives there."""
        size = len(self.keys)
        skipped = max(0, len(keys) - size)
        keys = keys[skipped:]
        slots = (self.position + skipped + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.position.add_(skipped + len(keys)).remainder_(size)
