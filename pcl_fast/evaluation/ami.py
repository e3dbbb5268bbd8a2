"""How much clusters and classes have to do with each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.special import entr, gammaln


class Agreement(NamedTuple):
    """How much two partitions agree: 1 if they are the same.

    ami: adjusted mutual information, 0 by chance, normalised by the mean of the two entropies (scikit-learn's since
        0.22).
    ami_max: the same normalised by the larger entropy (scikit-learn's before).
    nmi: mutual information over the mean of the entropies, which grows with the number of clusters even by chance.
    purity: share of the images that are of the most frequent class in their cluster.
    """

    ami: float
    ami_max: float
    nmi: float
    purity: float


def adjusted_mutual_information(assignment: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the AMI between clusters and classes, both integer [n]: 0 by chance, 1 for the same partition.

    It equals scikit-learn's adjusted_mutual_info_score, which takes most of a minute for each of ImageNet's
    granularities: that adds up what is expected by chance over all classes and clusters, this over all pairs of their
    sizes.
    """
    return agreement(assignment, labels).ami


def agreement(assignment: torch.Tensor, labels: torch.Tensor) -> Agreement:
    """Compare clusters with classes, both integer [n]."""
    (rows, classes), (columns, clusters) = (
        np.unique(partition.cpu().numpy(), return_inverse=True, return_counts=True)[1:]
        for partition in (labels, assignment)
    )
    # How many images of a class are in a cluster, wherever there are any.
    cells, counts = np.unique(rows * len(clusters) + columns, return_counts=True)
    row, column = np.divmod(cells, len(clusters))
    most_frequent = np.zeros_like(clusters)
    np.maximum.at(most_frequent, column, counts)
    n = len(rows)
    purity = float(most_frequent.sum() / n)
    if len(classes) == len(clusters) and len(classes) in (1, len(rows)):
        return Agreement(1.0, 1.0, 1.0, purity)  # there is only one partition of this kind: nothing is left to chance
    # sum p(i, j) log(p(i, j) / (p(i) p(j))), in whole numbers as long as they can be.
    information = max(float((counts / n * np.log(counts * n / (classes[row] * clusters[column]))).sum()), 0.0)
    expected = expected_mutual_information(classes, clusters)
    entropies = entr(classes / n).sum(), entr(clusters / n).sum()
    mean, most = sum(entropies) / 2, max(entropies)
    return Agreement(
        float((information - expected) / (mean - expected)),
        float((information - expected) / (most - expected)),
        float(information / mean),
        purity,
    )


def expected_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Return the expected mutual information, in nats, of two random partitions of n items into parts of sizes a and b.

    It is sum_ij sum_m P(m) m/n log(n m / (a_i b_j)) with hypergeometric P (Vinh, Epps and Bailey 2010, eq. 24a). A term
    depends on the sizes a_i and b_j alone, so equal sizes are computed once.
    """
    n = int(a.sum())
    log_factorial = gammaln(np.arange(n + 2) + 1.0)
    sizes, counts = np.unique(b, return_counts=True)
    total = 0.0
    for size, count in zip(*np.unique(a, return_counts=True), strict=True):
        m = np.arange(1, min(size, sizes[-1]) + 1)[:, None]
        possible = (m <= sizes) & (m >= size + sizes - n)
        log_ways = _log_choose(size, m, log_factorial) + _log_choose(n - size, sizes - m, log_factorial)
        chance = np.exp(log_ways - _log_choose(n, sizes, log_factorial), where=possible, out=np.zeros(possible.shape))
        total += count * (counts * (chance * m / n * np.log(n * m / (size * sizes))).sum(0)).sum()
    return float(total)


def _log_choose(n: np.ndarray | int, k: np.ndarray, log_factorial: np.ndarray) -> np.ndarray:
    """Return log(n choose k); where k > n or k < 0 the result has no meaning."""
    return log_factorial[n] - log_factorial[k] - log_factorial[n - k]
