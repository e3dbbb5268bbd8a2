"""The loss as the paper and the official code define it, row by row in Python and float64: slow on purpose, sharing
nothing with what it is compared with.
"""

from __future__ import annotations

import math

import torch

# What follows is the loss as the paper and the official code define it, row by row in Python and float64: slow on
# purpose, sharing nothing with what it is compared with, for tests only.


def info_nce_rows(query, key, queue, temperature) -> list[float]:
    """-log softmax of q.k'/tau among itself and q.(every queue key)/tau, per row."""
    losses = []
    for i in range(len(query)):
        logits = [_dot(query[i], key[i]) / temperature]
        logits += [_dot(query[i], queue[j]) / temperature for j in range(len(queue))]
        losses.append(_cross_entropy(logits))
    return losses


def proto_nce_rows(query, centroids, concentration, positives, negatives) -> list[float]:
    """Per row: its own prototype, against the other rows' prototypes and the sampled ones, each over its own phi.

    Another row contributes a column even if a third row shares its prototype; a row whose prototype is this row's own
    contributes none.
    """
    losses = []
    for i in range(len(query)):
        own = int(positives[i])
        columns = [own]
        columns += [int(positives[j]) for j in range(len(query)) if int(positives[j]) != own]
        columns += [int(c) for c in negatives]
        losses.append(_cross_entropy([_dot(query[i], centroids[c]) / float(concentration[c]) for c in columns]))
    return losses


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True))


def _cross_entropy(logits: list[float]) -> float:
    """-log softmax(logits)[0]."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[0]
