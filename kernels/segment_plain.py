"""Sums over clusters: the plain version of segment.py."""

from __future__ import annotations

import torch


def segment_sums(
    values: torch.Tensor, assignment: torch.Tensor, k: int, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what segment.py's `segment_sums` does; on a GPU the order of the additions, and so the last bits, are left to
    chance.
    """
    sums = values.new_empty(k, values.shape[1], dtype=torch.float32) if out is None else out
    sums.zero_()
    rows = max(1, (1 << 24) // values.shape[1])  # which bounds the float32 copy of values in half precision
    for chunk, clusters in zip(values.split(rows), assignment.split(rows), strict=True):
        sums.index_add_(0, clusters, chunk.float())
    return sums, torch.bincount(assignment, minlength=k)
