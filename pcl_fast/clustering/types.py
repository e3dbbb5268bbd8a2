"""What clustering returns: prototypes for the loss, and the result of k-means."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PrototypeSet(NamedTuple):
    """The prototypes of one granularity.

    centroids: [K, d] float32, unit norm.
    concentration: [K] float32, phi of each prototype (equation 12), used as its temperature; the tighter a cluster, the
        smaller its phi.
    assignment: [n] int32, the prototype of every image of the data set.
    """

    centroids: torch.Tensor
    concentration: torch.Tensor
    assignment: torch.Tensor


class KMeansResult(NamedTuple):
    """The result of k-means; the assignment belongs to exactly these centroids.

    centroids: [k, d] float32, of unit length if k-means was spherical, else not normalised.
    assignment: [n_local] int32, the centroid of each of this rank's points. On a GPU, float16 points may get a centroid
        up to a thousandth farther than the nearest, because the search rounds centroids.
    distance: [n_local] float32, squared L2 distance of each of this rank's points to its centroid.
    objective: sum of the distances on all ranks.
    """

    centroids: torch.Tensor
    assignment: torch.Tensor
    distance: torch.Tensor
    objective: float
