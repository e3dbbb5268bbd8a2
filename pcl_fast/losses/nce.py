"""Noise-contrastive estimation against a memory bank of all images, the loss of InstDisc (Wu et al., CVPR 2018).

Every image is a class of its own, and its weights are its feature f_i in the bank. That a feature v belongs to image i
has the probability (equations 4 and 5 of the paper)

    P(i|v) = exp(v.f_i/tau) / Z,        Z = sum_{j=1..n} exp(v.f_j/tau)                    n images

A softmax over all n would take Z of every v. Instead the loss learns to tell an image from noise: i was drawn either
with probability P(i|v) (once), or uniformly, with probability 1/n (K times). By Bayes' rule it was the former with
probability (equation 6)

    h(i, v) = P(i|v) / (P(i|v) + K/n)

and the loss of a row v of image i is minus the log-likelihood of one right answer about its own image and K about
noise j_1..j_K, which is uniform over all images, i among them (equation 7):

    loss = -log h(i, v) - sum_{k=1..K} log(1 - h(j_k, v))

Z is taken for a constant. It is estimated from a first batch (equation 8), Z = n times the mean of exp(v.f_j/tau) over
rows v and noise j.

How it is computed. Divide numerator and denominator of h by P and take logarithms, with the score s_j = v.f_j/tau and
the constant c = log(K/n) + log Z:

    h(j, v) = 1 / (1 + K/n / P(j|v)) = 1 / (1 + exp(c - s_j)) = sigmoid(s_j - c)

    loss = softplus(c - s_i) + sum_k softplus(s_jk - c)

    dloss/dv = ( -sigmoid(c - s_i) f_i + sum_k sigmoid(s_jk - c) f_jk ) / tau

In this form neither exp(s) nor Z is ever computed, and a row that is sure of its image keeps its gradient
sigmoid(c - s_i), where 1 - h would cancel to nothing. n does not matter by itself: log Z has it as a summand, and
log(K/n) takes it away again.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pcl_fast.distributed import all_gather_rows


def nce(
    query: torch.Tensor,
    own: torch.Tensor,
    noise: torch.Tensor,
    temperature: float,
    *,
    images: int,
    log_partition: torch.Tensor | float,
) -> torch.Tensor:
    """Return the loss of the module's docstring, row by row; differentiable in the query alone.

    Args:
        query: v [N, d] unit features, any floating dtype; scores and sums are float32 (float64 for a float64 query),
            under autocast too.
        own: f_i [N, d], each row's own feature in the bank.
        noise: f_j [K, d], features of the bank drawn uniformly from all images, for all rows the same.
        temperature: tau > 0.
        images: n.
        log_partition: log Z, a number or a 0-d tensor on the query's device.

    Returns:
        [N] in the scores' dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive, or n < 1.
    """
    _check(query, noise, temperature, images)
    if own.shape != query.shape or not own.is_floating_point() or own.device != query.device:
        raise ValueError(
            f"own must be {list(query.shape)} floating point on {query.device} to go with query, got "
            f"{list(own.shape)} {own.dtype} on {own.device}"
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, own, noise = query.to(dtype), own.detach().to(dtype), noise.detach().to(dtype)
        constant = math.log(len(noise) / images) + log_partition
        told = _softplus(constant - (query * own).sum(1) / temperature)
        return told + _softplus(query @ noise.T / temperature - constant).sum(1)


@torch.no_grad()
def estimate_log_partition(
    query: torch.Tensor,
    noise: torch.Tensor,
    temperature: float,
    *,
    images: int,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return log Z, estimated from a batch (see the module): log n + log mean exp(v.f_j/tau).

    Args:
        query, noise, temperature, images: see `nce`.
        group: the ranks, each with as many rows and as much noise; the mean is over all of theirs. None for this
            process alone.

    Returns:
        0-d in the scores' dtype, the same on all ranks.

    Raises:
        ValueError: see `nce`.
    """
    _check(query, noise, temperature, images)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(dtype) @ noise.to(dtype).T / temperature
        means = all_gather_rows(scores.flatten().logsumexp(0, keepdim=True) - math.log(scores.numel()), group)
        return means.logsumexp(0) + math.log(images / len(means))


def _softplus(x: torch.Tensor) -> torch.Tensor:
    # Above its threshold it is linear: at 40 the difference is below the resolution of float64 too.
    return F.softplus(x, threshold=40)


def _check(query: torch.Tensor, noise: torch.Tensor, temperature: float, images: int) -> None:
    for name, rows in (("query", query), ("noise", noise)):
        if rows.ndim != 2 or not rows.is_floating_point() or not len(rows):
            raise ValueError(f"{name} must be rows of d floating-point numbers, got {list(rows.shape)} {rows.dtype}")
    if noise.shape[1] != query.shape[1] or noise.device != query.device:
        raise ValueError(
            f"noise must be [K, {query.shape[1]}] on {query.device} to go with query {list(query.shape)}, got "
            f"{list(noise.shape)} on {noise.device}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if images < 1:
        raise ValueError(f"images is how many there are in the bank, 1 or more, got {images}")
