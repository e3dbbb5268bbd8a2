"""Linear classifiers on the same features, side by side in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from pcl_fast.distributed import all_reduce_sum

# How many logits, or features, are held at once.
_CHUNK = 1 << 26
_TOP = 5


class Accuracy(NamedTuple):
    """Shares of images, between 0 and 1, whose class has the largest logit, and whose class is among the five largest
    (among all, if there are fewer).
    """

    top1: float
    top5: float


class Classifiers(NamedTuple):
    """H linear classifiers of C classes.

    weight: float32 [H, C, width].
    bias: float32 [H, C].
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, H, C] of features [N, width], by one product for all classifiers."""
        heads, classes, width = self.weight.shape
        return torch.addmm(self.bias.view(-1), features, self.weight.view(-1, width).T).view(-1, heads, classes)

    def finite(self) -> torch.Tensor:
        """Return bool [H]: whether all of a classifier's entries are finite."""
        return self.weight.isfinite().all(2).all(1) & self.bias.isfinite().all(1)

    def pick(self, number: int) -> Classifiers:
        """Return one of them."""
        return Classifiers(self.weight[number : number + 1], self.bias[number : number + 1])

    @torch.no_grad()
    def accuracies(
        self, features: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None = None
    ) -> list[Accuracy | None]:
        """Return every classifier's accuracy; None for one that has diverged, whose entries are not all finite.

        Args:
            features: [n_local, width] of any floating type, this rank's images.
            labels: int64 [n_local], their classes.
            group: the ranks that hold the images; None for this process alone.
        """
        heads, classes = self.bias.shape
        rows = max(1, _CHUNK // max(heads * classes, self.weight.shape[2]))
        counts = torch.zeros(2 * heads + 1, dtype=torch.int64, device=features.device)
        counts[-1] = len(features)
        for chunk, answers in zip(features.split(rows), labels.split(rows), strict=True):
            best = self.logits(chunk.float()).topk(min(_TOP, classes), dim=2).indices
            hits = best == answers[:, None, None]
            counts[:heads] += hits[..., 0].sum(0)
            counts[heads:-1] += hits.any(2).sum(0)
        *found, total = all_reduce_sum(counts, group).tolist()
        counted = zip(found[:heads], found[heads:], self.finite().tolist(), strict=True)
        return [Accuracy(top1 / total, top5 / total) if finite else None for top1, top5, finite in counted]


def best(accuracies: Sequence[Accuracy | None]) -> int:
    """Return the place of the largest top-1 accuracy, the first of equals; None is less than any."""
    return max(range(len(accuracies)), key=lambda place: getattr(accuracies[place], "top1", -1.0))
