"""The loss as the official code computes it, rebuilt from a description of it: what we measure ourselves against.

Negative prototypes are chosen with Python lists and sets on the host, once per granularity and step. A row's twins (the
rows that have the same prototype) count as negatives. Everything else is plain PyTorch.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F

from pcl_fast.clustering import PrototypeSet


def choose_negatives(num_prototypes: int, num_negatives: int, positives: torch.Tensor) -> list[int]:
    """Draw distinct prototypes that are nobody's positive."""
    everything = [prototype for prototype in range(num_prototypes)]  # noqa: C416  as the official code does it
    others = set(everything) - set(positives.tolist())
    # The official code samples from the set itself. Python 3.11 refuses that; earlier versions made a tuple of it.
    return random.sample(list(others), num_negatives)


def proto_nce(
    query: torch.Tensor, prototypes: PrototypeSet, index: torch.Tensor, num_negatives: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logits [N, N + r], labels [N]) of one granularity."""
    positives = prototypes.assignment[index].long()
    negatives = choose_negatives(len(prototypes.centroids), num_negatives, positives)
    chosen = torch.cat([prototypes.centroids[positives], prototypes.centroids[negatives]])
    logits = query @ chosen.T
    temperature = prototypes.concentration[torch.cat([positives, torch.tensor(negatives, device=query.device)])]
    return logits / temperature, torch.arange(len(query), device=query.device)


def contrasts(
    query: torch.Tensor,
    key: torch.Tensor,
    queue: torch.Tensor,
    prototypes: list[PrototypeSet],
    index: torch.Tensor,
    *,
    temperature: float,
    num_negatives: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (logits, labels) of InfoNCE, then of every granularity."""
    positive = torch.einsum("nd,nd->n", query, key)[:, None]
    logits = torch.cat([positive, query @ queue.T], dim=1) / temperature
    instance = (logits, torch.zeros(len(query), dtype=torch.long, device=query.device))
    return [instance, *(proto_nce(query, granularity, index, num_negatives) for granularity in prototypes)]


def total(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return InfoNCE plus the mean of ProtoNCE over the granularities."""
    instance, *granularities = (F.cross_entropy(*part) for part in parts)
    return instance + sum(granularities) / len(granularities)


def loss(*inputs, **options) -> torch.Tensor:
    """Return the loss, from the arguments of `contrasts`."""
    return total(contrasts(*inputs, **options))
