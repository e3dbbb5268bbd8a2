"""The search that leaves out what bounds exclude, against distances in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pcl_fast.kernels import assign_plain

from pcl_fast.clustering import backends, bounds, kmeans
from pcl_fast.clustering.backends import Backend, pick_backend
from pcl_fast.clustering.bounds import BoundedSearch


def distances(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return distances [n, k] float64, summed from differences."""
    return torch.cdist(features.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")


def spread(n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    middle = F.normalize(torch.randn(12, d, generator=generator), dim=1)
    labels = torch.randint(12, (n,), generator=generator)
    return F.normalize(middle[labels] + 0.5 / d**0.5 * torch.randn(n, d, generator=generator), dim=1)


def nearly_equal(n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """Points that differ by rounding, far from the origin: float32's products tell nothing about them."""
    return 30 * F.normalize(torch.ones(d), dim=0) + 1e-4 * torch.randn(n, d, generator=generator)


def far_from_the_origin(n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """Points of which float32's products tell something, but less than bounds without their rounding would claim."""
    return 30 * F.normalize(torch.ones(d), dim=0) + 0.3 * torch.randn(n, d, generator=generator)


def duplicates(n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    return spread(-(-n // 2), d, generator).repeat(2, 1)[:n].contiguous()


def halves(n: int, d: int, generator: torch.Generator) -> torch.Tensor:
    return spread(n, d, generator).half()


def moves(features: torch.Tensor, k: int, generator: torch.Generator):
    """Yield centroids: points, the means of their clusters six times, a jump, a duplicate, small steps, no step."""
    centroids = features[torch.randperm(len(features), generator=generator)[:k]].float()
    for _ in range(6):
        yield centroids
        nearest = distances(features, centroids).argmin(1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, features.float())
        counts = torch.bincount(nearest, minlength=k)[:, None]
        centroids = torch.where(counts == 0, centroids, sums / counts.clamp(min=1))
    centroids = centroids.clone()
    centroids[k // 2] = 100
    yield centroids
    centroids = centroids.clone()
    centroids[k // 2] = centroids[k - 1]
    yield centroids
    for size in (1e-3, 1e-6, 0):
        centroids = centroids + size * torch.randn(centroids.shape, generator=generator)
        yield centroids


@pytest.mark.parametrize("data", [spread, nearly_equal, far_from_the_origin, duplicates, halves])
@pytest.mark.parametrize(("n", "k", "d"), [(300, 60, 16), (130, 90, 130), (333, 33, 2), (300, 7, 20)])
def test_finds_what_float64_finds(data, n, k, d, monkeypatch):
    """In pieces of a few rows, too."""
    monkeypatch.setattr(bounds, "_CHUNK", 1 << 12)
    generator = torch.Generator().manual_seed(torch.seed())
    features = data(n, d, generator)
    search, given_up = BoundedSearch(features, k), []
    for step, centroids in enumerate(moves(features, k, generator)):
        exact = distances(features, centroids)
        found = search(centroids)
        if search._before is None:
            given_up.append(step)
            continue
        least = exact.min(1).values
        assert (exact.gather(1, found[:, None])[:, 0] <= least * (1 + 1e-14)).all(), (step, generator.initial_seed())
        bounds_hold(search, exact)
    assert data is nearly_equal or not given_up, given_up


def test_long_centroids_and_short_points():
    """The rounding of the centroids' norms hides what the points say."""
    generator = torch.Generator().manual_seed(torch.seed())
    features = 3e-3 * torch.randn(400, 20, generator=generator)
    search = BoundedSearch(features, 60)
    for _ in range(4):
        centroids = 30 * F.normalize(torch.randn(60, 20, generator=generator), dim=1)
        exact = distances(features, centroids)
        found = search(centroids)
        assert search._before is not None
        assert (exact.gather(1, found[:, None]) <= exact.min(1, keepdim=True).values * (1 + 1e-14)).all()
        bounds_hold(search, exact)


def bounds_hold(search: BoundedSearch, exact: torch.Tensor) -> None:
    """No bound is wrong, by however little."""
    nearest = search._assignment
    own = exact.gather(1, nearest[:, None])
    assert (search._upper.double() >= own[:, 0]).all()
    others = exact.scatter(1, nearest[:, None], torch.inf)
    others = F.pad(others, (0, search._unused), value=torch.inf)
    nearest_others = others.view(len(exact), search._size, search._groups).amin(1)
    assert (search._lower.T.double() <= nearest_others).all()


def test_of_equal_centroids_the_first_is_found():
    features = spread(400, 16, torch.Generator().manual_seed(3))
    search = BoundedSearch(features, 44)
    first = assign_plain.nearest(features, features[:40])
    for order in (torch.cat([torch.arange(40), torch.arange(4)]), torch.tensor([*range(40), 7, 7, 7, 9])):
        assert torch.equal(search(features[order]), first)


def test_nearly_equal_points_end_as_the_plain_search_has_them():
    features = torch.ones(200, 8)
    centroids = torch.ones(40, 8)
    search = BoundedSearch(features, 40)
    for _ in range(2):
        assert torch.equal(search(centroids), assign_plain.nearest(features, centroids))


def test_nothing_is_compared_that_is_known(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = spread(2000, 32, generator)
    compared, whole = [], []
    compare, search_all = BoundedSearch._compare, BoundedSearch._search_all
    monkeypatch.setattr(
        BoundedSearch, "_compare", lambda self, group, point: compared.append(len(point)) or compare(self, group, point)
    )
    monkeypatch.setattr(BoundedSearch, "_search_all", lambda self: whole.append(1) or search_all(self))
    search = BoundedSearch(features, 24)
    centroids = features[:24].clone()
    search(centroids)
    assert len(whole) == 1
    compared.clear()
    search(centroids)
    assert sum(compared) < 20  # ties and what is left of the start
    for _ in range(2):
        centroids = centroids + 1e-3 * torch.randn(centroids.shape, generator=generator)
        search(centroids)
        assert 0 < sum(compared) < 0.1 * search._lower.numel()
    compared.clear()
    search(centroids)
    assert sum(compared) < 20
    assert len(whole) == 1
    search(features[100:124].clone())
    assert len(whole) == 2  # all is compared where all has changed


def test_threads_change_no_bit():
    features = spread(3000, 64, torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            search, centroids = BoundedSearch(features, 400), features[:400].clone()
            for _ in range(5):
                found = search(centroids)
                centroids = backends.segment_plain.segment_sums(features, found, 400)[0] / 8
            results.append(found)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kmeans_ends_where_the_plain_search_ends(dtype, monkeypatch):
    """Splits of empty clusters included."""
    features = spread(1500, 24, torch.Generator().manual_seed(2)).to(dtype)
    init = torch.cat([features[:60].float(), features[:20].float() + 50])
    plain = kmeans(features, 80, init=init, iterations=12)
    searches = []
    monkeypatch.setattr(backends, "WORTHWHILE", 1)
    monkeypatch.setattr(backends, "BoundedSearch", lambda *arguments: searches.append(1) or BoundedSearch(*arguments))
    ours, again = (kmeans(features, 80, init=init, iterations=12) for _ in range(2))
    assert len(searches) == 2
    assert torch.equal(ours.assignment, plain.assignment)
    torch.testing.assert_close(ours.centroids, plain.centroids, rtol=0, atol=1e-6)
    assert torch.equal(ours.centroids, again.centroids)
    assert ours.objective == pytest.approx(plain.objective, rel=1e-6)


def test_bounds_are_for_large_problems_on_a_cpu():
    features = torch.zeros(3000, 4)
    cpu = pick_backend("auto", features.device, features.dtype, 4)
    assert isinstance(cpu.begin_search(features, 350), BoundedSearch)
    assert not isinstance(cpu.begin_search(features, 300), BoundedSearch)
    for other in (pick_backend("torch", torch.device("cuda"), features.dtype, 4), Backend(*cpu[:2])):
        assert not isinstance(other.begin_search(features, 350), BoundedSearch)
