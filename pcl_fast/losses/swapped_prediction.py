"""Swapped prediction, the loss of SwAV (Caron et al., NeurIPS 2020, equations 1 and 2, over several crops)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def swapped_prediction(scores: torch.Tensor, codes: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of every crop's prediction with the code of every other crop that has one,

        loss_n = -1/A sum_a 1/(V-1) sum_{v != a} sum_k q_ank log( exp(s_vnk/tau) / sum_j exp(s_vnj/tau) )

    Args:
        scores: [V, N, K] of V crops of each of N images for K prototypes, floating point; computed in float32 (float64
            for float64 scores), under autocast too. The only input that gets a gradient.
        codes: [A, N, K] of the first A of these crops, rows of sum 1.
        temperature: tau > 0.

    Returns:
        [N] in the type that it is computed in: the losses of the images, whose mean is that of the batch.

    Raises:
        ValueError: shapes that do not fit, a single crop, or a temperature that is not positive.
    """
    _check(scores, codes, temperature)
    crops, images, prototypes = scores.shape
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        codes = codes.detach().to(scores.dtype)
        # A crop predicts several codes at once: their sum, but for its own.
        targets = codes.sum(0).expand_as(scores).clone()
        targets[: len(codes)].sub_(codes)
        logits, targets = (rows.reshape(-1, prototypes) for rows in (scores / temperature, targets))
        loss = F.cross_entropy(logits, targets, reduction="none")
    return loss.view(crops, images).sum(0) / (len(codes) * (crops - 1))


def _check(scores: torch.Tensor, codes: torch.Tensor, temperature: float) -> None:
    if scores.ndim != 3 or not scores.is_floating_point() or not scores.numel() or len(scores) < 2:
        raise ValueError(
            f"scores must be [V, N, K] floating point with V >= 2 crops, got {list(scores.shape)} {scores.dtype}"
        )
    if codes.ndim != 3 or codes.shape[1:] != scores.shape[1:] or not 1 <= len(codes) <= len(scores):
        raise ValueError(
            f"codes must be [A, {scores.shape[1]}, {scores.shape[2]}] with A from 1 to {len(scores)}, as scores are "
            f"{list(scores.shape)}, got {list(codes.shape)}"
        )
    if codes.device != scores.device:
        raise ValueError(f"scores and codes must be on one device, got {scores.device} and {codes.device}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
