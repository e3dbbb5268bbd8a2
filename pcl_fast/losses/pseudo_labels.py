"""Cross-entropy of embeddings among frozen prototypes, the loss of one head of DeepCluster-v2 (Caron et al., 2020)."""

from __future__ import annotations

import math

import torch

from pcl_fast.kernels import contrast_plain
from pcl_fast.losses.contrast import ContrastResult


def pseudo_label_loss(
    embedding: torch.Tensor, centroids: torch.Tensor, label: torch.Tensor, temperature: float
) -> ContrastResult:
    """Return each row's cross-entropy of its pseudo-label among all centroids,

        loss_i = -log( exp(z_i.c_y/tau) / sum_k exp(z_i.c_k/tau) ),    y = label_i,

    and whether that centroid scores highest. A row without a label has loss 0 and no gradient. Rows never mix, so the
    mean over all rows gives every image the same weight, whichever others are beside it and on however many ranks.

    Args:
        embedding: [N, d] unit features, any floating dtype; scores are float32 (float64 for a float64 embedding), under
            autocast too. The only input that gets a gradient, which is exact for confident rows too.
        centroids: [K, d] floating point, unit prototypes.
        label: int32 or int64 [N], below K; negative where an image has none.
        temperature: tau > 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive, or (on a CPU, where a
            look costs nothing) a label beyond the centroids.
    """
    _check(embedding, centroids, label, temperature)
    known, positive = label >= 0, label.clamp(min=0).long()
    own = positive[:, None] == torch.arange(len(centroids), device=label.device)
    with torch.autocast(embedding.device.type, enabled=False):
        loss, correct = contrast_plain.contrast(
            embedding, centroids[positive], 1 / temperature, centroids, 1 / temperature, own
        )
    return ContrastResult(loss * known, correct & known)


def _check(embedding: torch.Tensor, centroids: torch.Tensor, label: torch.Tensor, temperature: float) -> None:
    for name, rows in (("embedding", embedding), ("centroids", centroids)):
        if rows.ndim != 2 or not rows.is_floating_point() or not len(rows):
            raise ValueError(f"{name} must be [n, d] floating point with n >= 1, got {list(rows.shape)} {rows.dtype}")
    if embedding.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"embedding and centroids must be of one length, got {embedding.shape[1]} and {centroids.shape[1]}"
        )
    if label.shape != embedding.shape[:1] or label.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"label must be int32 or int64 [{len(embedding)}], got {label.dtype} {list(label.shape)}")
    if not embedding.device == centroids.device == label.device:
        raise ValueError(
            f"embedding, centroids and label must be on one device, got {embedding.device}, {centroids.device} and "
            f"{label.device}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if label.device.type == "cpu" and int(label.max()) >= len(centroids):
        raise ValueError(f"label must be below the {len(centroids)} centroids, got {int(label.max())}")
