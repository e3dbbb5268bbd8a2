"""Features with clusters in them, and how near they lie to the centroids that a provider found."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pcl_fast.kernels import assign_plain

from pcl_fast.clustering.lloyd import squared_distance

SPREAD = 0.8  # length of the noise, where a cluster's direction has length 1
CHECKED = 20_000  # points that a result is judged by
TOLERANCE = 1e-3  # relative difference of mean distances that counts as equal


def unit_features(points: int, clusters: int, d: int, device: str) -> torch.Tensor:
    """Return unit features [points, d] float32: random directions plus noise, made in chunks on the device."""
    generator = torch.Generator(device).manual_seed(0)
    directions = F.normalize(torch.randn(clusters, d, generator=generator, device=device), dim=1)
    features = torch.empty(points, d, device=device)
    for chunk in features.split(1 << 18):
        labels = torch.randint(clusters, (len(chunk),), generator=generator, device=device)
        noise = torch.randn(chunk.shape, generator=generator, device=device)
        chunk.copy_(F.normalize(directions[labels] + SPREAD / d**0.5 * noise, dim=1))
    return features


def some_points(features: torch.Tensor, k: int) -> torch.Tensor:
    """Return k distinct points [k, d] float32, for k-means to start from."""
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:k]
    return features[chosen.to(features.device)].float()


def mean_distance(features: torch.Tensor, centroids: torch.Tensor, assignment: torch.Tensor | None = None) -> float:
    """Return the mean distance of CHECKED points to the centroids in `assignment`, or to the nearest ones without it.

    The points are evenly spread over all, the last one included.
    """
    rows = torch.linspace(0, len(features) - 1, min(len(features), CHECKED), dtype=torch.float64).long()
    points, centroids = features[rows.to(features.device)].float(), centroids.float()
    own = (
        assign_plain.nearest(points, centroids) if assignment is None else assignment[rows.to(assignment.device)].long()
    )
    return squared_distance(points, centroids, own.to(points.device)).sqrt().mean().item()
