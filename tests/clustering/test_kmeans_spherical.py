"""Spherical k-means against a transcription in float64 and faiss, on one rank and on several."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from pcl_fast.clustering import backends, kmeans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    "torch",
    pytest.param(
        "faiss", marks=pytest.mark.skipif(not find_spec("faiss"), reason="needs faiss, which the requirements install")
    ),
    "triton",
]


def points(n: int, d: int = 16, *, seed: int = 0) -> torch.Tensor:
    """Unit features [n, d] that have much in common, in a dozen clusters."""
    generator = torch.Generator().manual_seed(seed)
    middle = 1.0 + torch.randn(12, d, generator=generator)
    labels = torch.randint(0, 12, (n,), generator=generator)
    return F.normalize(middle[labels] + 0.7 * torch.randn(n, d, generator=generator), dim=1).to(DEVICE)


def transcribed(features: torch.Tensor, init: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(centroids, assignment) in float64, where no cluster becomes empty."""
    features, centroids = features.double().cpu(), F.normalize(init.double().cpu(), dim=1)
    for _ in range(iterations):
        nearest = (features @ centroids.T).argmax(1)
        sums = torch.stack([features[nearest == cluster].sum(0) for cluster in range(len(init))])
        centroids = sums / sums.norm(dim=1, keepdim=True)
    return centroids, (features @ centroids.T).argmax(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", [1, 4])
def test_equals_the_transcription_from_the_same_start(backend, iterations):
    """A start of any length is scaled to unit length, in a copy."""
    features = points(300)
    init = features[:15] * torch.linspace(0.2, 5, 15, device=DEVICE)[:, None]
    kept = init.clone()
    centroids, assignment = transcribed(features, init, iterations)
    found = kmeans(features, 15, iterations=iterations, init=init, backend=backend, spherical=True)
    torch.testing.assert_close(found.centroids.cpu(), centroids.float(), atol=1e-6, rtol=0)
    assert torch.equal(found.assignment.cpu().long(), assignment)
    distance = (features.double().cpu() - centroids[assignment]).square().sum(1)
    torch.testing.assert_close(found.distance.cpu(), distance.float(), atol=1e-6, rtol=0)
    assert found.objective == pytest.approx(distance.sum().item(), rel=1e-6)
    assert torch.equal(init, kept)
    plain = kmeans(features, 15, iterations=iterations, init=init, backend=backend)
    assert (plain.centroids.norm(dim=1) < 0.99).any()


def test_equals_faiss_from_the_same_start():
    features = points(700)
    theirs = pytest.importorskip("faiss").Kmeans(16, 15, niter=6, spherical=True, max_points_per_centroid=700)
    theirs.train(features.cpu().numpy(), init_centroids=features[:15].cpu().numpy())
    found = kmeans(features, 15, iterations=6, init=features[:15].clone(), spherical=True)
    np.testing.assert_allclose(found.centroids.cpu().numpy(), theirs.centroids, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_comes_as_near(backend):
    features = points(200)
    exact = kmeans(features, 12, iterations=4, init=features[:12].clone(), spherical=True, backend="torch")
    found = kmeans(features.half(), 12, iterations=4, init=features[:12].clone(), spherical=True, backend=backend)
    assert found.objective == pytest.approx(exact.objective, rel=1e-3)
    torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(12, device=DEVICE))


def half_far_away(features: torch.Tensor) -> torch.Tensor:
    """16 centroids, half of them on the side where no point is."""
    return torch.cat([features[:8], -features[8:16]])


@pytest.mark.parametrize("split_by", ["spread", "size"])
def test_empty_clusters_take_from_others_and_all_are_of_unit_length(split_by):
    features = points(600)
    for iterations in (1, 2, 10):
        found = kmeans(
            features, 16, iterations=iterations, init=half_far_away(features), split_by=split_by, spherical=True
        )
        torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(16, device=DEVICE), atol=2e-7, rtol=0)
    assert torch.bincount(found.assignment, minlength=16).min() > 0


def of_shard(world, features, bounds, split_by):
    shard = features[bounds[world.rank] : bounds[world.rank + 1]]
    options = {"iterations": 5, "group": world.group, "split_by": split_by, "spherical": True}
    drawn = kmeans(shard, 15, redo=3, seed=3, prune_after=2, **options)
    return drawn, kmeans(shard, 16, init=half_far_away(features), **options)


@pytest.mark.parametrize("split_by", ["spread", "size"])
def test_ranks_with_unequal_shards_equal_one_rank(alone, split_by):
    features = points(600).cpu()
    ranks = run_ranks(2, of_shard, features, (0, 380, 600), split_by)
    for number, whole in enumerate(of_shard(alone, features, (0, 600), split_by)):
        results = [results[number] for results in ranks]
        assert torch.equal(torch.cat([result.assignment for result in results]), whole.assignment)
        for result in results:
            assert torch.equal(result.centroids, results[0].centroids)
            torch.testing.assert_close(result.centroids, whole.centroids, atol=1e-5, rtol=0)
            assert result.objective == pytest.approx(whole.objective, rel=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU searches all centroids, without bounds")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bounds_change_nothing(dtype, monkeypatch):
    features = points(1500, 8).to(dtype)
    results = []
    for worthwhile in (1 << 60, 0):
        monkeypatch.setattr(backends, "WORTHWHILE", worthwhile)
        results.append(kmeans(features, 60, iterations=15, redo=2, spherical=True))
    assert torch.equal(results[0].assignment, results[1].assignment)
    assert torch.equal(results[0].centroids, results[1].centroids)


def test_starts_that_are_left_early_leave_the_bits_of_the_others():
    features = points(900)
    options = {"iterations": 8, "spherical": True}
    pruned, again = (kmeans(features, 12, redo=4, seed=5, prune_after=3, **options) for _ in range(2))
    assert torch.equal(pruned.centroids, again.centroids)
    alone = [kmeans(features, 12, seed=5 + start, **options) for start in range(4)]
    assert any(torch.equal(pruned.centroids, result.centroids) for result in alone)
    whole = kmeans(features, 12, redo=4, seed=5, **options)
    assert whole.objective == min(result.objective for result in alone)


def test_a_centroid_whose_points_cancel_stays():
    """Of (1, 0) and (-1, 0), and of no unit vector is their mean nearer than of others."""
    features = torch.tensor([[1.0, 0], [-1, 0]], device=DEVICE)
    found = kmeans(features, 1, iterations=3, init=torch.tensor([[0.0, 2]], device=DEVICE), spherical=True)
    assert found.centroids.tolist() == [[0, 1]]
    assert found.objective == 4


def test_a_start_at_0_is_refused():
    features = points(20)
    init = features[:3].clone()
    init[1] = 0
    with pytest.raises(ValueError, match="init cannot be scaled to unit length: 1 of 3 rows are 0"):
        kmeans(features, 3, init=init, spherical=True)
    kmeans(features, 3, init=init)
