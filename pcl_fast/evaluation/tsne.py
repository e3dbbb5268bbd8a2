"""A map of features in the plane, and how far it can be trusted."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

# How many principal components t-SNE starts from.
COMPONENTS = 50
# How many comparisons are held at once.
_CHUNK = 1 << 26


def embed(features: np.ndarray, *, perplexity: float = 30.0, iterations: int = 1000, seed: int = 0) -> np.ndarray:
    """Map features to the plane by t-SNE (van der Maaten and Hinton 2008), from their 50 first principal components.

    Args:
        features: [n, d]; at unit length their distances, which t-SNE takes, are those of their cosines.
        perplexity: smaller than n.
        iterations: of t-SNE.
        seed: of everything that is random.

    Returns:
        [n, 2] float32.
    """
    if min(features.shape) > COMPONENTS:
        features = PCA(COMPONENTS, random_state=seed).fit_transform(features)
    tsne = TSNE(perplexity=perplexity, max_iter=iterations, init="pca", random_state=seed)
    return tsne.fit_transform(features).astype(np.float32)


def map_neighbours(embedding: np.ndarray, neighbours: int) -> torch.Tensor:
    """Return the positions, int64 [n, neighbours], of every point's nearest other points, the nearest first."""
    search = NearestNeighbors(n_neighbors=neighbours).fit(embedding)
    return torch.from_numpy(search.kneighbors(return_distance=False))


def neighbour_accuracy(found: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of the points that are of the class of their nearest neighbour, the first of `found` [n, k];
    labels are integer [n].
    """
    return float((labels[found[:, 0]] == labels).double().mean())


@torch.no_grad()
def trustworthiness(features: torch.Tensor, found: torch.Tensor) -> float:
    """Return how far a map's neighbours are neighbours among the features (Venna and Kaski 2001): 1 if all are.

    T = 1 - 2 / (n k (2n - 3k - 1)) sum_i sum_j max(0, r(i, j) - k) over the k neighbours j of i in the map, where j is
    the r-th nearest to i among the features. scikit-learn's holds three n x n matrices, this a few rows.

    Args:
        features: [n, d] of unit length, k < n / 2.
        found: int64 [n, k], each point's neighbours in the map.
    """
    (n, k), found = found.shape, found.to(features.device)
    penalty = 0
    for rows in torch.arange(n, device=features.device).split(max(1, _CHUNK // (n * k))):
        similarity = features[rows] @ features.T
        similarity[torch.arange(len(rows), device=features.device), rows] = -torch.inf
        theirs = similarity.gather(1, found[rows])
        rank = 1 + (similarity[:, None, :] > theirs[:, :, None]).sum(2)
        penalty += int((rank - k).clamp(min=0).sum())
    return 1 - 2 * penalty / (n * k * (2 * n - 3 * k - 1))
