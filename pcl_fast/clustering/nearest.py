"""Nearest centroid of every point: the part of k-means that differs between backends.

argmin_j |x - c_j|^2 = argmax_j (x . c_j - |c_j|^2 / 2), so |x|^2 is never needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pcl_fast.errors import MissingPackageError

Nearest = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Scores of one chunk of points: 16 MiB stay in a CPU's caches (measured best of 1 to 256 MiB at k = 1000), a GPU
# needs more work per launch.
_CHUNK_SCORES = {"cpu": 1 << 22, "cuda": 1 << 28}


def pick_nearest(backend: str) -> Nearest:
    """The function (features [n, d], centroids [k, d]) -> int64 [n] of a backend.

    Raises:
        ValueError: no such backend.
        MissingPackageError: faiss is asked for and not installed.
    """
    if backend in ("auto", "torch"):
        return nearest_torch
    if backend == "faiss":
        return _load_faiss()
    raise ValueError(f'k-means has the backends "auto", "faiss" and "torch", not {backend!r}')


def nearest_torch(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Exact search by chunked matrix products in the features' dtype; ties go to the lowest index."""
    rows = max(1, _CHUNK_SCORES.get(features.device.type, 1 << 24) // len(centroids))
    offset = -0.5 * centroids.square().sum(1)
    assignment = torch.empty(len(features), dtype=torch.int64, device=features.device)
    for begin in range(0, len(features), rows):
        chunk = features[begin : begin + rows]
        torch.argmax(torch.addmm(offset, chunk, centroids.T), dim=1, out=assignment[begin : begin + rows])
    return assignment


def _load_faiss() -> Nearest:
    try:
        import faiss
        import faiss.contrib.torch_utils
    except ImportError as error:
        raise MissingPackageError(
            'k-means backend "faiss" needs the package faiss-gpu (see requirements/); backend "torch" does not'
        ) from error

    def nearest_faiss(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        if not len(features):
            return torch.empty(0, dtype=torch.int64, device=features.device)
        if features.device.type == "cuda":
            _, assignment = faiss.knn_gpu(_gpu_resources(features.device), features, centroids, 1)
        else:
            _, assignment = faiss.knn(features, centroids, 1)
        return assignment.view(-1)

    resources: dict[torch.device, object] = {}

    def _gpu_resources(device: torch.device) -> object:
        if device not in resources:
            resources[device] = faiss.StandardGpuResources()
        return resources[device]

    return nearest_faiss
