"""Concentration against a literal, slow version of equation 12."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ranks import run_ranks

from pcl_fast.clustering import concentration


def slow(distance, assignment, k, temperature, alpha=10.0, clip=(10, 90)):
    """Compute equation 12 cluster by cluster, as it is written."""
    phi = [None] * k
    for c in range(k):
        members = [math.sqrt(x) for x, a in zip(distance.tolist(), assignment.tolist(), strict=True) if a == c]
        if len(members) > 1:
            phi[c] = sum(members) / (len(members) * math.log(len(members) + alpha))
    largest = max(value for value in phi if value is not None)
    phi = np.array([largest if value is None else value for value in phi])
    phi = np.clip(phi, np.percentile(phi, clip[0]), np.percentile(phi, clip[1]))
    return phi * temperature / phi.mean()


def case(n: int = 400, k: int = 30, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return (distance, assignment, k), in which clusters 0 and 1 are empty, and 2 and 3 have a single point, far from
    its centroid.
    """
    generator = torch.Generator().manual_seed(seed)
    distance = torch.rand(n, generator=generator)
    assignment = torch.randint(4, k, (n,), generator=generator, dtype=torch.int32)
    assignment[0], assignment[1] = 2, 3
    distance[:2] = 50.0
    return distance, assignment, k


@pytest.mark.parametrize("clip", [(10, 90), (0, 100), (25, 50)])
@pytest.mark.parametrize("alpha", [10.0, 1.0])
def test_equals_the_slow_version(alpha, clip):
    distance, assignment, k = case()
    ours = concentration(distance, assignment, k, temperature=0.2, alpha=alpha, clip=clip)
    np.testing.assert_allclose(ours.numpy(), slow(distance, assignment, k, 0.2, alpha, clip), rtol=1e-5)
    assert ours.dtype == torch.float32
    assert ours.mean().item() == pytest.approx(0.2)


def test_clusters_without_an_estimate_take_the_largest():
    distance, assignment, k = case()
    phi = concentration(distance, assignment, k, temperature=0.2, clip=(0, 100))
    assert phi[:4].tolist() == [phi.max().item()] * 4


def concentration_of_shard(world, distance, assignment, k):
    rows = slice(0, 90) if world.rank == 0 else slice(90, None)
    return concentration(distance[rows], assignment[rows], k, temperature=0.2, group=world.group)


def test_two_ranks_equal_one():
    distance, assignment, k = case()
    whole = concentration(distance, assignment, k, temperature=0.2)
    for phi in run_ranks(2, concentration_of_shard, distance, assignment, k):
        torch.testing.assert_close(phi, whole)


def test_identical_points_do_not_make_infinite_logits():
    """In a third of the clusters all distances are 0, so the 10th percentile of phi is 0 too."""
    distance, assignment = torch.full((90,), 0.3), torch.arange(90) % 9
    distance[assignment < 3] = 0
    phi = concentration(distance, assignment, 9, temperature=0.2)
    assert phi.min() > 0
    assert phi.isfinite().all()


@pytest.mark.parametrize("assignment", [torch.zeros(5, dtype=torch.int64), torch.arange(5)])
def test_without_any_spread_all_are_alike(assignment):
    phi = concentration(torch.zeros(5), assignment, 5, temperature=0.3)
    torch.testing.assert_close(phi, torch.full((5,), 0.3))


def test_errors_name_the_argument():
    distance, assignment, k = case()
    cases = [
        (lambda: concentration(distance[1:], assignment, k, temperature=0.2), r"\[399\] and \[400\]"),
        (lambda: concentration(distance, assignment, k, temperature=0), "temperature must be positive, got 0"),
        (lambda: concentration(distance, assignment, k, temperature=1, clip=(90, 10)), "clip"),
        (lambda: concentration(distance, assignment, k, temperature=1, alpha=0), "alpha"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, where sums may change their order")
def test_on_a_gpu_the_same_bits_every_time():
    distance, assignment, k = case(100_000, 3000)
    on_cpu = concentration(distance, assignment, k, temperature=0.2)
    on_gpu, again = (concentration(distance.cuda(), assignment.cuda(), k, temperature=0.2) for _ in range(2))
    assert torch.equal(on_gpu, again)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=0)
