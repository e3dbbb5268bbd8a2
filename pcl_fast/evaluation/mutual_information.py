"""How much features and clusters say about the classes, in nats."""

from __future__ import annotations

import torch
from sklearn.metrics import mutual_info_score

# How many numbers of a batch of columns are sorted at once.
_CHUNK = 1 << 24


def cluster_information(assignment: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mutual information of clusters and classes, both integer [n], from their joint frequencies."""
    return float(mutual_info_score(labels.cpu().numpy(), assignment.cpu().numpy()))


@torch.no_grad()
def feature_information(
    features: torch.Tensor, labels: torch.Tensor, *, neighbours: int = 3, seed: int = 0
) -> torch.Tensor:
    """Estimate the mutual information of every single dimension of the features with the classes (Ross 2014, "Mutual
    Information between Discrete and Continuous Data Sets").

    I = psi(n) + <psi(k_i)> - <psi(N_i)> - <psi(m_i)>, where N_i is the number of images of the class of image i, k_i
    the smaller of `neighbours` and N_i - 1, and m_i the number of images, i among them, that are nearer to i than the
    k_i-th nearest of its class. What falls below 0 is 0, and classes with a single image are left out.

    It is scikit-learn's mutual_info_classif, which takes seconds for a dimension of 10,000 images and is out of reach
    for a million: in one dimension neighbours are found by sorting. As there, values that are alike are told apart by
    noise of 1e-10 standard deviations.

    Args:
        features: [n, d], on any device, where the work is done in float64.
        labels: integer [n].
        neighbours: k.
        seed: of the noise.

    Returns:
        [d] float64.

    Raises:
        ValueError: no class has two images.
    """
    _, labels, counts = labels.to(features.device).unique(return_inverse=True, return_counts=True)
    kept = counts[labels] > 1
    if not kept.any():
        raise ValueError("mutual information needs classes of at least two images, every class has one")
    order = labels[kept].argsort(stable=True)
    features, sizes = features[kept][order], counts[counts > 1]
    generator = torch.Generator().manual_seed(seed)
    columns = max(1, _CHUNK // len(features))
    return torch.cat([_ross(_noisy(part.T, generator), sizes, neighbours) for part in features.split(columns, dim=1)])


def _noisy(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return values [c, n] as contiguous float64 of standard deviation 1, with a little noise."""
    values = values.double()
    deviation = values.std(1, correction=0, keepdim=True)
    values = values / torch.where(deviation > 0, deviation, 1.0)
    scale = 1e-10 * values.abs().mean(1, keepdim=True).clamp(min=1)
    noise = torch.stack([torch.randn(len(row), generator=generator, dtype=torch.float64) for row in values])
    return (values + scale * noise.to(values.device)).contiguous()


def _ross(values: torch.Tensor, sizes: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Return the estimate for every row of values [c, n]; the first sizes[0] columns are of one class, and so on."""
    size = sizes.repeat_interleave(sizes)
    k = (size - 1).clamp(max=neighbours)
    ordered = values.sort(dim=1).values
    within, radius = _radius(values, sizes, neighbours)
    # Where the sum of value and radius is rounded, the neighbour at this distance stays outside all the same.
    radius = radius * (1 - 1e-12)
    nearer = torch.searchsorted(ordered, within + radius) - torch.searchsorted(ordered, within - radius, right=True)
    psi = torch.digamma
    constant = psi(k.new_tensor(len(k)).double()) + psi(k.double()).mean() - psi(size.double()).mean()
    return (constant - psi(nearer.clamp(min=1).double()).mean(1)).clamp(min=0)


def _radius(values: torch.Tensor, sizes: torch.Tensor, neighbours: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort each class by itself: return the values [c, n] in this order, and how far the k-th nearest of its class is
    from each.
    """
    classes = torch.arange(len(sizes), device=values.device).repeat_interleave(sizes)
    rank = values.argsort(dim=1)
    values = values.gather(1, rank.gather(1, classes[rank].argsort(dim=1, stable=True)))
    size = sizes.repeat_interleave(sizes)
    end = sizes.cumsum(0).repeat_interleave(sizes)
    place = torch.arange(len(end), device=values.device)
    k = (size - 1).clamp(max=neighbours)
    radius = torch.full_like(values, torch.inf)
    # The nearest k are next to one another, `below` of them under the value.
    for below in range(neighbours + 1):
        first, last = place - below, place - below + k
        possible = (below <= k) & (first >= end - size) & (last < end)
        first, last = first.clamp(min=0), last.clamp(max=len(end) - 1)
        reach = torch.maximum(values - values[:, first], values[:, last] - values)
        radius = torch.where(possible, torch.minimum(radius, reach), radius)
    return values, radius
