"""A collapse: an encoder that makes the same of all images, whatever the loss says."""

from __future__ import annotations

import torch

# Of unit features: with less spread than this they are all alike. A new ResNet has 0.04 to 0.25.
COLLAPSED = 0.01


def spread(features: torch.Tensor) -> torch.Tensor | None:
    """How far unit features [N, dim] of different images are apart: 1 less the mean cosine similarity of two of them,
    0-d float32. None for a single image.
    """
    rows = len(features)
    if rows < 2:
        return None
    similarities = features.float().sum(0).square().sum() - rows  # of all ordered pairs
    return 1 - similarities / (rows * (rows - 1))
