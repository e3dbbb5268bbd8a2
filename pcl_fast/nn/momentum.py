"""The momentum encoder: a moving average of an encoder's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


def momentum_copy(encoder: nn.Module) -> nn.Module:
    """A copy of an encoder that no gradient reaches."""
    return copy.deepcopy(encoder).requires_grad_(False)


class MovingAverage:
    """Moves the parameters of a momentum encoder behind those of an encoder. Batch-norm statistics stay its own."""

    def __init__(self, average: nn.Module, of: nn.Module, momentum: float):
        """
        Args:
            average: the momentum encoder.
            of: the encoder that it follows, with the same parameters.
            momentum: share of itself that it keeps at each update.
        """
        self.momentum = momentum
        self._pairs = (list(average.parameters()), list(of.parameters()))

    @torch.no_grad()
    def update(self) -> None:
        """Set average = momentum * average + (1 - momentum) * of, all parameters in one call."""
        averages, sources = self._pairs
        torch._foreach_lerp_(averages, sources, 1 - self.momentum)
