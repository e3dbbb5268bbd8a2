"""The plain version of assign.py: PyTorch operations alone, on any device and for any d."""

from __future__ import annotations

import torch

# How many scores are held at once. On a CPU so few that they stay in its caches (4 MiB was the best of 1 to 256 MiB at
# k = 1000); a GPU needs more work per launch.
_CHUNK_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}
# To find a maximum is cheap, to find its place is not. So the maximum of each group of this many columns is found
# first, then the place within the best group. On a CPU this saves 11% of the whole search at k = 1000 and 21% at
# k = 5000, compared with argmax over all columns.
_GROUP = 64


def nearest(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the index of each point's nearest centroid, int64 [n]; of equally near ones, the lowest index.

    The matrix products are in fp32, chunk by chunk.

    Args:
        features: [n, d] float16 or float32; centroids: [k, d] float32.
    """
    n, k = len(features), len(centroids)
    groups = -(-k // _GROUP)
    rows = max(1, min(n, _CHUNK_SCORES.get(features.device.type, 1 << 24) // (groups * _GROUP)))
    # The last group may be shorter than the others; its unused columns stay at -inf.
    scores = centroids.new_full((rows, groups * _GROUP), -torch.inf)
    row = torch.arange(rows, device=features.device)
    by_column, offset = centroids.T.contiguous(), -0.5 * centroids.square().sum(1)
    assignment = torch.empty(n, dtype=torch.int64, device=features.device)
    for begin in range(0, n, rows):
        chunk = features[begin : begin + rows].float()
        here = scores[: len(chunk)]
        torch.addmm(offset, chunk, by_column, out=here[:, :k])
        by_group = here.view(len(chunk), groups, _GROUP)
        group = by_group.amax(2).max(1).indices
        place = by_group[row[: len(chunk)], group].max(1).indices
        torch.add(place, group, alpha=_GROUP, out=assignment[begin : begin + rows])
    return assignment
