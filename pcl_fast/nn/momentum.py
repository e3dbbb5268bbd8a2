"""The momentum encoder: an encoder whose weights are a moving average of another's."""

from __future__ import annotations

import copy
import math

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


class GrowingMovingAverage:
    """The same with a momentum that grows in the course of the run, from `momentum` at step 0 to 1 at step K,

        momentum_k = 1 - (1 - momentum) (cos(pi k / K) + 1) / 2

    (Grill et al. 2020, section 3.2). The momentum encoder's batch-norm statistics stay its own.
    """

    def __init__(self, average: nn.Module, of: nn.Module, momentum: float, steps: int):
        """
        Args:
            average: the momentum encoder.
            of: the encoder that it follows, which has the same architecture.
            momentum: the share of its own weights that the momentum encoder keeps at step 0.
            steps: K, of the whole run. From there on the momentum encoder stays as it is.
        """
        self.momentum, self.steps = momentum, steps
        self._pairs = (list(average.parameters()), list(of.parameters()))

    def share(self, number: torch.Tensor | int) -> torch.Tensor:
        """1 - momentum_k, what the momentum encoder takes of the other: 0-d float64 on the device of the step's number,
        a 0-d int64 tensor or an integer. (Near 1 the momentum itself would lose it to rounding.)
        """
        left = (self.steps - torch.as_tensor(number)).clamp(min=0).double()
        # (cos(pi k / K) + 1) / 2, which would cancel towards the end.
        return (1 - self.momentum) * (left * (math.pi / 2 / self.steps)).sin().square()

    @torch.no_grad()
    def update(self, number: torch.Tensor | int, applied: torch.Tensor) -> None:
        """Set average = momentum_k * average + (1 - momentum_k) * of. Nothing waits for the device, and a captured step
        can be given another number.

        Args:
            number: k, of the step from 0: a 0-d int64 tensor on the parameters' device, or on a CPU an integer.
            applied: 0-d bool on the device. False leaves everything as it is.
        """
        averages, sources = self._pairs
        share = torch.where(applied, self.share(number), 0.0).to(averages[0].dtype)
        # A lerp, which takes its weight from the host only, or one for each entry.
        differences = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(differences, share)
        torch._foreach_add_(averages, differences)
