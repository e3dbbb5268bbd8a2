"""What clustering hands to the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PrototypeSet(NamedTuple):
    """One granularity of the E-step.

    centroids: [K, d] float32, unit norm.
    concentration: [K] float32, phi of each prototype (equation 12), a temperature: smaller is tighter.
    assignment: [n] int32, prototype of every image of the data set.
    """

    centroids: torch.Tensor
    concentration: torch.Tensor
    assignment: torch.Tensor


class KMeansResult(NamedTuple):
    """centroids [k, d] float32; and of this rank's points, for exactly these centroids: assignment [n_local] int32 and
    distance [n_local] float32, the squared L2 distance. objective: sum of all ranks' distances. (Of float16 points on a
    GPU some may have a centroid that is farther than the nearest by up to a thousandth: the search rounds centroids.)
    """

    centroids: torch.Tensor
    assignment: torch.Tensor
    distance: torch.Tensor
    objective: float
