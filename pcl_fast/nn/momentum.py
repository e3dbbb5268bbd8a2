"""The momentum encoder: an encoder whose weights are a moving average of another's."""

from __future__ import annotations

import copy

import torch
from torch import nn


def momentum_copy(encoder: nn.Module) -> nn.Module:
    """Return a copy of an encoder whose parameters take no gradient."""
    return copy.deepcopy(encoder).requires_grad_(False)


class MovingAverage:
    """Moves a momentum encoder's parameters towards another encoder's. Its batch-norm statistics stay its own."""

    def __init__(self, average: nn.Module, of: nn.Module, momentum: float):
        """
        Args:
            average: the momentum encoder.
            of: the encoder that it follows, which has the same architecture.
            momentum: the share of its own weights that the momentum encoder keeps at each update.
        """
        self.momentum = momentum
        self._pairs = (list(average.parameters()), list(of.parameters()))

    @torch.no_grad()
    def update(self) -> None:
        """Set average = momentum * average + (1 - momentum) * of, for all parameters in one call."""
        averages, sources = self._pairs
        torch._foreach_lerp_(averages, sources, 1 - self.momentum)
