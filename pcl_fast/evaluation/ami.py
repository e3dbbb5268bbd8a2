"""Adjusted mutual information between clusters and classes."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score


def adjusted_mutual_information(assignment: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the AMI between clusters and classes, both integer [n]: 0 by chance, 1 for the same partition.

    It equals scikit-learn's adjusted_mutual_info_score, which takes most of a minute for each of ImageNet's
    granularities: that adds up what is expected by chance over all classes and clusters, this over all pairs of their
    sizes.
    """
    labels, assignment = labels.cpu().numpy(), assignment.cpu().numpy()
    classes, clusters = (np.unique(partition, return_counts=True)[1] for partition in (labels, assignment))
    if len(classes) == len(clusters) and len(classes) in (1, len(labels)):
        return 1.0  # there is only one partition of this kind, so nothing is left to chance
    expected = expected_mutual_information(classes, clusters)
    most = (entropy(classes) + entropy(clusters)) / 2
    return float((mutual_info_score(labels, assignment) - expected) / (most - expected))


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
