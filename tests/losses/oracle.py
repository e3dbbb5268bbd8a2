"""The loss as the paper and the official code define it, computed row by row in Python and float64. It is slow on
purpose, and shares nothing with what it is compared with.
"""

from __future__ import annotations

import math

import torch


def info_nce_rows(query, key, queue, temperature) -> list[float]:
    """Return InfoNCE per row: -log softmax of q.k'/tau among itself and q.(every queue key)/tau."""
    losses = []
    for i in range(len(query)):
        logits = [_dot(query[i], key[i]) / temperature]
        logits += [_dot(query[i], queue[j]) / temperature for j in range(len(queue))]
        losses.append(_cross_entropy(logits))
    return losses


def proto_nce_rows(query, centroids, concentration, positives, negatives) -> list[float]:
    """Return ProtoNCE per row: its own prototype against the other rows' prototypes and the sampled ones, with the
    score of every prototype divided by its own phi.

    Every other row adds a column, even if a third row has the same prototype; a row whose prototype is this row's own
    adds none.
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
    """Return a.b in float64, summed without rounding."""
    return math.fsum(x * y for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True))


def _cross_entropy(logits: list[float]) -> float:
    """Return -log softmax(logits)[0]."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[0]
