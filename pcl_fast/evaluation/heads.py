"""Linear heads that are trained side by side, each by its own SGD, for the price of one pass through the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pcl_fast.evaluation.classifiers import Classifiers
from pcl_fast.seeds import Purpose, mix_seeds

# Behind the purpose in the seed: the held-out part has none.
_WEIGHTS = 1


class Setting(NamedTuple):
    """What tells one head of a grid from another. The weight decay pulls at weights and bias, as in PyTorch's SGD."""

    lr: float
    weight_decay: float

    def __str__(self) -> str:
        return f"lr {self.lr:g}, weight decay {self.weight_decay:g}"


class Heads:
    """H linear heads on the same features, of the same initial weights: N(0, 0.01) and no bias.

    Everything is float32. The sum of their losses has the gradients of each alone, so that a step is two products, one
    forward and one backward, and one update of each tensor. A head's SGD is torch.optim.SGD's.

    settings: of every head.
    classifiers, momenta: their weights and biases, and the momentum buffers of these.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        width: int,
        classes: int,
        *,
        seed: int,
        device: torch.device,
        momentum: float = 0.9,
    ):
        self.settings, self.momentum = tuple(settings), momentum
        generator = torch.Generator().manual_seed(mix_seeds(seed, Purpose.EVALUATION, _WEIGHTS))
        first = (0.01 * torch.randn(classes, width, generator=generator)).to(device)
        weight = first.repeat(len(settings), 1, 1)
        bias = torch.zeros(len(settings), classes, device=device)
        self.classifiers = Classifiers(weight, bias)
        self.momenta = Classifiers(torch.zeros_like(weight), torch.zeros_like(bias))
        self._rates = torch.tensor([setting.lr for setting in settings], device=device)
        self._decays = torch.tensor([setting.weight_decay for setting in settings], device=device)
        self._decaying = any(setting.weight_decay for setting in settings)

    def step(self, features: torch.Tensor, labels: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """Take one step of every head; nothing waits for the device.

        Args:
            features: float32 [N, width], without a gradient.
            labels: int64 [N].
            factor: times every learning rate.

        Returns:
            float32 [H], every head's mean cross entropy before the step.
        """
        count, rows = len(self.settings), len(features)
        if not count:
            return self._rates
        weight, bias = (tensor.detach().requires_grad_() for tensor in self.classifiers)
        logits = Classifiers(weight, bias).logits(features).flatten(0, 1)
        losses = F.cross_entropy(logits, labels.repeat_interleave(count), reduction="none").view(rows, count).mean(0)
        self._descend(torch.autograd.grad(losses.sum(), (weight, bias)), factor)
        return losses.detach()

    @torch.no_grad()
    def _descend(self, gradients: Sequence[torch.Tensor], factor: float) -> None:
        for tensor, buffer, gradient in zip(self.classifiers, self.momenta, gradients, strict=True):
            shape = (-1,) + (1,) * (tensor.dim() - 1)
            if self._decaying:
                gradient = gradient.addcmul_(tensor, self._decays.view(shape))
            buffer.mul_(self.momentum).add_(gradient)
            tensor.addcmul_(buffer, (-factor * self._rates).view(shape))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that is learned: tensors whose first dimension is the heads."""
        names = ("weight", "bias", "weight momentum", "bias momentum")
        return dict(zip(names, (*self.classifiers, *self.momenta), strict=True))

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `tensors` returned, of as many heads."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
