"""The momentum encoder."""

from __future__ import annotations

import copy

import torch
from torch import nn


class MomentumTwin:
    """Keeps `key` a moving average of `query`: parameters only, batch-norm statistics are the key encoder's own."""

    def __init__(self, query: nn.Module, momentum: float):
        """momentum: share of itself that the twin keeps per update."""
        self.key = copy.deepcopy(query).requires_grad_(False)
        self.momentum = momentum
        self._pairs = (list(self.key.parameters()), list(query.parameters()))

    @torch.no_grad()
    def update(self) -> None:
        """key = momentum * key + (1 - momentum) * query, all parameters in one call."""
        keys, queries = self._pairs
        torch._foreach_lerp_(keys, queries, 1 - self.momentum)
