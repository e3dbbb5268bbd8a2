"""The search for the nearest centroid against float64. Without a GPU the kernels run in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pcl_fast.kernels import assign_plain
from pcl_fast.kernels.assign import CLASSES, nearest, widest
from pcl_fast.kernels.launch import NEAREST, nearest_tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.float32]


def clustered(n: int, k: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit features around k / 2 centres, and centroids near some of them, as k-means meets them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, k // 2), d, generator=generator)
    labels = torch.randint(0, len(centres), (n + k,), generator=generator)
    points = F.normalize(centres[labels] + 0.5 * torch.randn(n + k, d, generator=generator), dim=1)
    centroids = points[n:] + 0.02 * torch.randn(k, d, generator=generator)
    return points[:n].to(DEVICE, dtype), centroids.to(DEVICE)


def distances(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return squared distances [n, k] float64, summed from differences."""
    return torch.stack([(row.double() - centroids.double()).square().sum(1) for row in features])


def excess(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return how much farther each found centroid is than the nearest, [n] float64."""
    assert found.min() >= 0
    assert found.max() < exact.shape[1]
    return exact.gather(1, found.long()[:, None])[:, 0] - exact.min(1).values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [
        (1, 1, 128),
        (130, 1, 16),
        (127, 127, 128),
        (128, 128, 128),
        (129, 129, 128),
        (300, 257, 128),
        (60, 400, 3),
        (60, 130, 20),
        (60, 130, 129),
        (60, 130, 256),
    ],
)
def test_finds_the_nearest_at_and_across_the_edges_of_tiles(n, k, d, dtype):
    features, centroids = clustered(n, k, d, dtype)
    exact = distances(features, centroids)
    found = nearest(features, centroids)
    assert found.dtype == torch.int32
    if dtype == torch.float16:
        assert (excess(found, exact) <= 1e-3 * exact.min(1).values + 1e-6).all()
    else:
        plainly = excess(assign_plain.nearest(features, centroids), exact)
        assert (excess(found, exact) <= plainly + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_on_clustered_features(dtype):
    features, centroids = clustered(3000, 500, 32, dtype, seed=1)
    exact = torch.cdist(features.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = nearest(features, centroids)
    if dtype == torch.float16:
        assert (found == exact.argmin(1)).double().mean() >= 0.999
        assert (excess(found, exact) <= 1e-3 * exact.min(1).values).all()
    else:
        assert (excess(found, exact) < 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_column_can_win(dtype):
    """Every point is a centroid, so the nearest ones lie in all tiles and classes, and at both ends of a class."""
    k = 2 * nearest_tile(90, dtype.itemsize)[128].columns + 3
    features, _ = clustered(k, k, 24, dtype, seed=2)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(nearest(features, features[order].float())[order].long(), torch.arange(k, device=DEVICE))


@pytest.mark.parametrize("magnitude", [1e-12, 1e-3, 300.0, 1e12])
def test_float32_features_of_any_magnitude(magnitude):
    """Numbers are scaled to the range of fp16 before they are split into two fp16 numbers."""
    features, centroids = clustered(150, 140, 40, torch.float32, seed=3)
    centroids[::7] *= 0.01  # so that centroids differ in magnitude too
    exact = distances(features, centroids)
    found = nearest(features * magnitude, centroids * magnitude)
    assert (excess(found, exact) <= excess(assign_plain.nearest(features, centroids), exact) + 1e-6).all()


def test_float32_points_at_the_border_of_two_clusters():
    """Points lie on either side of the border by 1e-5 of the centroids' distance, and would cross it if points or
    centroids were rounded to fp16.
    """
    generator = torch.Generator().manual_seed(0)
    one, other = F.normalize(torch.randn(2, 64, generator=generator), dim=1)
    along = torch.randn(300, 64, generator=generator)
    across = F.normalize(one - other, dim=0)
    along -= (along @ across)[:, None] * across
    side = torch.randint(0, 2, (300,), generator=generator)
    points = (one + other) / 2 + 0.05 * along + 1e-5 * (1 - 2 * side[:, None]) * (one - other)
    centroids = 3 * F.normalize(torch.randn(200, 64, generator=generator), dim=1)
    places = torch.tensor([3, 140])  # in different classes, so that `sweep` and not `settle` decides between them
    centroids[places] = torch.stack([one, other])
    assert torch.equal(nearest(points.to(DEVICE), centroids.to(DEVICE)).cpu().long(), places[side])


@pytest.mark.parametrize("dtype", DTYPES)
def test_correlated_features(dtype):
    """All features are far from the origin in one direction, so products are large and nearly equal."""
    features, centroids = clustered(200, 150, 64, torch.float32, seed=4)
    features, centroids = (features + 2).to(dtype), centroids + 2
    exact = distances(features, centroids)
    if dtype == torch.float16:  # whose rounding error there is up to 2^-10 in each of 64 entries
        tolerance = 0.05 * exact.min(1).values
    else:
        tolerance = 2 * excess(assign_plain.nearest(features, centroids), exact).max() + 1e-5
    assert (excess(nearest(features, centroids), exact) <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_one_of_the_equals(dtype):
    features, centroids = clustered(100, 70, 16, dtype, seed=5)
    doubled = torch.cat([centroids, centroids, centroids])
    found, once = nearest(features, doubled) % 70, nearest(features, centroids)
    assert (found == once).double().mean() > 0.99
    same = torch.ones_like(features)
    assert (nearest(same, same[:20].float()) < 20).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_zeros(dtype):
    zeros = torch.zeros(40, 16, dtype=dtype, device=DEVICE)
    assert (nearest(zeros, zeros[:30].float()) < 30).all()
    _, centroids = clustered(1, 30, 16, dtype)
    assert (nearest(zeros, centroids) == centroids.square().sum(1).argmin()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_points(dtype):
    features, centroids = clustered(0, 5, 16, dtype)
    assert nearest(features, centroids).shape == (0,)


def test_the_plain_version_takes_the_lowest_of_equals():
    """This holds across its groups of columns too, of which the last is shorter."""
    features, centroids = clustered(300, 70, 16, torch.float32, seed=6)
    exact = distances(features, centroids)
    assert torch.equal(assign_plain.nearest(features, torch.cat([centroids, centroids, centroids])), exact.argmin(1))
    assert torch.equal(
        assign_plain.nearest(features.half(), centroids), assign_plain.nearest(features.half().float(), centroids)
    )


def test_tiles_fit_the_kernels():
    """A class is made of pairs of columns, so a tile must have a multiple of 2 CLASSES columns."""
    for by_type in NEAREST.values():
        for by_width in by_type.values():
            assert set(by_width) <= {128, 256}
            assert all(tile.columns % (2 * CLASSES) == 0 for tile in by_width.values())


def test_types_that_are_not_taken():
    assert widest(torch.bfloat16, torch.device(DEVICE)) == 0
    assert widest(torch.float64, torch.device(DEVICE)) == 0
