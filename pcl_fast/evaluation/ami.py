"""Adjusted mutual information between clusters and classes."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score


def adjusted_mutual_information(assignment: torch.Tensor, labels: torch.Tensor) -> float:
    """AMI between clusters and classes, both integer [n]: 0 for chance, 1 for the same partition.

    As scikit-learn's adjusted_mutual_info_score, which takes most of a minute for each of ImageNet's granularities: it
    adds up what is expected by chance for every class and cluster, here it is for every pair of their sizes.
    """
    labels, assignment = labels.cpu().numpy(), assignment.cpu().numpy()
    classes, clusters = (np.unique(partition, return_counts=True)[1] for partition in (labels, assignment))
    if len(classes) == len(clusters) and len(classes) in (1, len(labels)):
        return 1.0  # there is no other partition of the kind, and so no chance
    expected = expected_mutual_information(classes, clusters)
    most = (entropy(classes) + entropy(clusters)) / 2
    return float((mutual_info_score(labels, assignment) - expected) / (most - expected))


def expected_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Of two partitions with parts of sizes a and b, over all ways to deal n items out to them, in nats.

    sum_ij sum_m P(m) m/n log(n m / (a_i b_j)) with P hypergeometric (Vinh, Epps and Bailey 2010, eq. 24a). It depends
    on i and j by their sizes alone.
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
    """Of no meaning where k > n or k < 0."""
    return log_factorial[n] - log_factorial[k] - log_factorial[n - k]
