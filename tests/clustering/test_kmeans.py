"""k-means against scikit-learn and faiss, on one rank and on several."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pcl_fast.kernels import assign, assign_plain, segment
from ranks import run_ranks
from sklearn.cluster import KMeans

from pcl_fast.clustering import cluster, kmeans, pick_backend
from pcl_fast.clustering.lloyd import Shards, draw_points, take_turns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    "torch",
    pytest.param(
        "faiss", marks=pytest.mark.skipif(not find_spec("faiss"), reason="needs faiss, which the requirements install")
    ),
    "triton",
]


def blobs(n: int, d: int = 16, centres: int = 12, seed: int = 0) -> torch.Tensor:
    """Return unit features [n, d] around so many centres."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, d, generator=generator)
    labels = torch.randint(0, centres, (n,), generator=generator)
    return F.normalize(middle[labels] + 0.5 * torch.randn(n, d, generator=generator), dim=1).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_scikit_learn_from_the_same_start(backend):
    features = blobs(900)
    init = features[:15].clone()
    theirs = scikit_learn(features, init, iterations=8)
    ours = kmeans(features, 15, iterations=theirs.n_iter_, init=init, backend=backend)
    assert ours.objective == pytest.approx(theirs.inertia_, rel=1e-5)
    assert (ours.assignment.cpu().numpy() == theirs.labels_).all()
    np.testing.assert_allclose(ours.centroids.cpu().numpy(), theirs.cluster_centers_, atol=1e-5)


def scikit_learn(features: torch.Tensor, init: torch.Tensor, iterations: int) -> KMeans:
    options = {"n_init": 1, "max_iter": iterations, "tol": 0, "algorithm": "lloyd"}
    return KMeans(len(init), init=init.cpu().numpy(), **options).fit(features.cpu().numpy())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_of_any_layout_is_left_alone(backend):
    features = blobs(200)
    init = features[:5].clone()
    transposed = init.T.contiguous().T
    results = [kmeans(features, 5, iterations=2, init=start, backend=backend) for start in (init, transposed)]
    assert torch.equal(results[0].centroids, results[1].centroids)
    assert torch.equal(init, features[:5])
    assert torch.equal(transposed, init)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_and_distances_belong_to_the_centroids_returned(backend):
    features = blobs(500)
    result = kmeans(features, 20, iterations=2, backend=backend)
    exact = torch.cdist(features.double(), result.centroids.double()).square()
    torch.testing.assert_close(result.distance.double(), exact.min(1).values, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.assignment.long(), exact.argmin(1))
    assert result.assignment.dtype == torch.int32
    assert result.objective == pytest.approx(exact.min(1).values.sum().item(), rel=1e-6)


def kmeans_of_shard(world, features, bounds, backend):
    shard = features[bounds[world.rank] : bounds[world.rank + 1]]
    return kmeans(shard, 15, iterations=6, redo=3, seed=3, group=world.group, backend=backend, prune_after=3)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *[(backend, torch.float32) for backend in ("torch", "faiss", "triton")],
        ("triton", torch.float16),
    ],
)
@pytest.mark.parametrize(
    "bounds",
    [
        (0, 200, 450),
        pytest.param((0, 0, 450), marks=pytest.mark.slow),
        pytest.param((0, 175, 190, 450), marks=pytest.mark.slow),
    ],
)
def test_ranks_with_unequal_shards_equal_one_rank(backend, dtype, bounds):
    """The ranks are CPU processes, connected by gloo."""
    if backend == "faiss":
        pytest.importorskip("faiss")
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("the interpreter is off where there is a GPU")
    features = blobs(450).cpu().to(dtype)
    whole = kmeans(features, 15, iterations=6, redo=3, seed=3, backend=backend, prune_after=3)
    ranks = run_ranks(len(bounds) - 1, kmeans_of_shard, features, bounds, backend)
    for result in ranks:
        torch.testing.assert_close(result.centroids, whole.centroids, atol=1e-5, rtol=0)
        assert result.objective == pytest.approx(whole.objective, rel=1e-6)
    assert torch.equal(torch.cat([result.assignment for result in ranks]), whole.assignment)


@pytest.mark.parametrize("backend", BACKENDS)
def test_objective_after_20_iterations(backend):
    """In either precision it is within 0.1% of scikit-learn's and of faiss's from the same start."""
    features = blobs(500, seed=7)
    init = features[:20].clone()
    theirs = scikit_learn(features, init, iterations=20)
    faiss_kmeans = pytest.importorskip("faiss").Kmeans(16, 20, niter=20, max_points_per_centroid=500)
    faiss_kmeans.train(features.cpu().numpy(), init_centroids=init.cpu().numpy())
    of_faiss = torch.from_numpy(faiss_kmeans.centroids).to(DEVICE)
    of_faiss = torch.cdist(features, of_faiss).min(1).values.square().sum().item()
    for ours in (features, features.half()):
        objective = kmeans(ours, 20, iterations=20, init=init, backend=backend).objective
        assert objective == pytest.approx(theirs.inertia_, rel=1e-3)
        assert objective == pytest.approx(of_faiss, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_seed_decides(backend):
    features = blobs(600)
    first, again, other = (kmeans(features, 30, iterations=3, seed=seed, backend=backend) for seed in (1, 1, 2))
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)


def start_of_shard(world, features, bounds):
    shard = features[bounds[world.rank] : bounds[world.rank + 1]]
    lengths = [end - begin for begin, end in pairwise(bounds)]
    return draw_points(Shards(shard, lengths, world.group), 40, 5)


@pytest.mark.parametrize("bounds", [(0, 400, 900), (0, 0, 900), (0, 350, 380, 900)])
def test_the_start_is_the_same_for_any_number_of_ranks(bounds):
    features = blobs(900).cpu()
    whole = draw_points(Shards(features, [900], None), 40, 5)
    assert len(whole.unique(dim=0)) == 40
    for start in run_ranks(len(bounds) - 1, start_of_shard, features, bounds):
        assert torch.equal(start, whole)


def test_stops_when_no_assignment_changes(monkeypatch):
    features = blobs(400)
    searches = count_searches(monkeypatch)
    patient = kmeans(features, 6, iterations=500)
    needed = len(searches)
    assert needed < 60
    # The last search found what the one before it had found, so no update followed: one update fewer gives the same.
    same = kmeans(features, 6, iterations=needed - 1)
    assert torch.equal(same.centroids, patient.centroids)
    assert torch.equal(same.assignment, patient.assignment)
    assert not torch.equal(kmeans(features, 6, iterations=needed - 3).centroids, patient.centroids)


def count_searches(monkeypatch) -> list:
    """Return a list to which every search from now on appends its number of clusters."""
    searches = []

    def counting(*arguments):
        backend = pick_backend(*arguments)

        def nearest(features, centroids):
            searches.append(len(centroids))
            return backend.nearest(features, centroids)

        return backend._replace(nearest=nearest)

    for module in ("kmeans", "cluster"):  # by name, as the package's attributes are their functions
        monkeypatch.setattr(import_module(f"pcl_fast.clustering.{module}"), "pick_backend", counting)
    return searches


def test_granularities_take_turns(monkeypatch):
    """One granularity searches while the other's sums travel."""
    events = count_searches(monkeypatch)

    def begin(tensor, group):
        events.append("sums leave")
        return lambda: events.append("sums needed")

    monkeypatch.setattr("pcl_fast.clustering.lloyd.begin_all_reduce_sum", begin)
    features = blobs(300)
    together = cluster(features, (4, 20), temperature=0.2, iterations=3, redo=2, seed=1)
    if DEVICE == "cuda":  # where a second stream waits for the sums at once, and the host does not
        assert events[:6] == [4, "sums leave", "sums needed", 20, "sums leave", "sums needed"]
    else:
        a_round = ["sums needed", 4, "sums leave", "sums needed", 20, "sums leave"]
        assert events[:10] == [4, "sums leave", 20, "sums leave", *a_round]
    assert [event for event in events if event in (4, 20)] == [4, 20] * 8
    for m, k in enumerate((4, 20)):
        alone = kmeans(features, k, iterations=3, redo=2, seed=1 + 2 * m)
        assert torch.equal(together[m].assignment, alone.assignment)


def test_take_turns_returns_in_order():
    def task(steps):
        for _ in range(steps):
            yield
        return steps

    assert take_turns([task(3), task(0), task(1)]) == [3, 0, 1]


def objective_of_clusters(features: torch.Tensor, seed: int, iterations: int) -> float:
    """Return the objective of the clusters that a start has after so many iterations, before the next search."""
    clusters = kmeans(features, 12, iterations=iterations - 1, seed=seed).assignment.long()
    means = kmeans(features, 12, iterations=iterations, seed=seed).centroids
    return (features - means[clusters]).square().sum().item()


@pytest.mark.parametrize("seed", range(4))
def test_only_the_start_that_leads_goes_on(seed, monkeypatch):
    """It ends with the bits that it has without the others."""
    features = blobs(900, centres=900)
    leader = min(range(seed, seed + 5), key=lambda start: objective_of_clusters(features, start, 3))
    alone = kmeans(features, 12, iterations=9, seed=leader)
    nearest, searches = assign_plain.nearest, []
    monkeypatch.setattr(assign_plain, "nearest", lambda *args: searches.append(1) or nearest(*args))
    pruned = kmeans(features, 12, iterations=9, redo=5, seed=seed, prune_after=3, backend="torch")
    assert len(searches) == 5 * 3 + 6 + 1
    assert pruned.objective == alone.objective
    assert torch.equal(pruned.centroids, alone.centroids)
    assert torch.equal(pruned.assignment, alone.assignment)


def test_a_start_that_has_ended_before_the_others_are_left_is_kept():
    """Four points in four places: nothing moves after the first iteration."""
    features = torch.eye(4, device=DEVICE).repeat(5, 1)
    whole, pruned = (kmeans(features, 4, iterations=9, redo=6, prune_after=after) for after in (None, 5))
    assert pruned.objective == whole.objective
    assert torch.equal(pruned.centroids, whole.centroids)


def test_redo_keeps_the_best_start():
    features = blobs(600)
    alone = [kmeans(features, 12, iterations=5, seed=4 + start).objective for start in range(5)]
    best = kmeans(features, 12, iterations=5, redo=5, seed=4)
    assert max(alone) > min(alone)
    assert best.objective == min(alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_clusters_as_points(backend):
    features = blobs(40)
    result = kmeans(features, 40, iterations=3, backend=backend)
    assert sorted(result.assignment.tolist()) == list(range(40))
    assert result.objective < 1e-8


def half_far_away(features: torch.Tensor) -> torch.Tensor:
    """Return 16 centroids, half of them far from all points."""
    far = 100 + torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    return torch.cat([features[:8], far.to(features.device)])


@pytest.mark.parametrize("split_by", ["spread", "size"])
def test_empty_clusters_take_from_others(split_by):
    """After a few iterations no cluster is empty."""
    features = blobs(600)
    init = half_far_away(features)
    result = kmeans(features, 16, iterations=10, init=init, seed=2**63 - 1, split_by=split_by)
    counts = torch.bincount(result.assignment, minlength=16)
    assert counts.min() > 0
    assert result.objective < 0.9 * kmeans(features, 8, iterations=10, init=init[:8]).objective


def descend_with_empty_clusters(world, features, bounds, split_by):
    shard = features[bounds[world.rank] : bounds[world.rank + 1]]
    return kmeans(shard, 16, iterations=4, init=half_far_away(features), group=world.group, split_by=split_by)


@pytest.mark.parametrize("split_by", ["spread", "size"])
def test_ranks_split_the_same_clusters(split_by):
    features = blobs(600).cpu()
    whole = kmeans(features, 16, iterations=4, init=half_far_away(features), split_by=split_by)
    ranks = run_ranks(2, descend_with_empty_clusters, features, (0, 380, 600), split_by)
    assert torch.equal(torch.cat([result.assignment for result in ranks]), whole.assignment)
    for result in ranks:
        torch.testing.assert_close(result.centroids, whole.centroids, atol=1e-5, rtol=0)


def test_the_widest_cluster_is_split_or_the_largest():
    generator = torch.Generator().manual_seed(0)
    tight, left, right = (
        centre + 0.01 * torch.randn(n, 4, generator=generator)
        for n, centre in (
            (300, torch.tensor([5.0, 5, 5, 5])),
            (20, torch.tensor([1.0, 2, 1, 2])),
            (20, torch.tensor([2.0, 1, 2, 1])),
        )
    )
    features = torch.cat([tight, left, right]).to(DEVICE)
    init = torch.stack([features[0], features[300:].mean(0), torch.full((4,), -90.0, device=DEVICE)])
    result = kmeans(features, 3, iterations=10, init=init)
    assert sorted(torch.bincount(result.assignment, minlength=3).tolist()) == [20, 20, 300]
    # The draw is for the large one with a chance of 299 in 338.
    by_size = [kmeans(features, 3, iterations=10, init=init, seed=seed, split_by="size") for seed in range(5)]
    assert any(sorted(torch.bincount(found.assignment, minlength=3))[1] > 40 for found in by_size)


def test_goes_on_until_a_split_succeeds():
    """The widest cluster lies around 0, so that its halves are the same point. To split it changes no assignment, but
    k-means must go on, and split another one.
    """
    ends = torch.tensor([[0.0, 0, 3], [0, 0, -3]])
    features = torch.cat([ends, torch.tensor([4.0, 4, 4]) + blobs(8, d=3, centres=1).cpu()]).to(DEVICE)
    init = torch.stack([features[:2].mean(0), features[2:].mean(0), torch.full((3,), 50.0, device=DEVICE)])
    result = kmeans(features, 3, iterations=60, init=init)
    assert torch.bincount(result.assignment, minlength=3).min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_points_equal(backend):
    """One cluster holds all points, and splitting it does not help: the other clusters stay empty."""
    result = kmeans(torch.ones(10, 4, device=DEVICE), 3, iterations=5, backend=backend)
    torch.testing.assert_close(result.centroids.cpu(), torch.ones(3, 4), rtol=0, atol=2e-3)
    assert result.objective < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_clusters_than_distinct_points(backend):
    features = blobs(7).repeat(10, 1)
    result = kmeans(features, 20, iterations=8, backend=backend)
    assert result.centroids.isfinite().all()
    exact = torch.cdist(features, result.centroids).square()
    torch.testing.assert_close(result.distance, exact.min(1).values, atol=1e-5, rtol=0)
    for phi in (prototypes.concentration for prototypes in cluster(features, (20,), temperature=0.1, backend=backend)):
        assert phi.isfinite().all()
        assert (phi > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_cluster_is_the_mean(backend, dtype):
    features = blobs(70, d=13).to(dtype)
    result = kmeans(features, 1, backend=backend)
    torch.testing.assert_close(result.centroids[0], features.float().mean(0), atol=1e-6, rtol=0)
    assert not result.assignment.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_features(backend):
    """Centroids and distances are float32, and the clustering is nearly that of the float32 features."""
    features = blobs(300, d=21)
    half, full = (kmeans(x, 12, iterations=8, seed=2, backend=backend) for x in (features.half(), features))
    assert half.centroids.dtype == half.distance.dtype == torch.float32
    assert half.objective == pytest.approx(full.objective, rel=1e-3)
    exact = (
        torch.cdist(features.half().double(), half.centroids.double())
        .square()
        .gather(1, half.assignment.long()[:, None])
    )
    torch.testing.assert_close(half.distance.double(), exact[:, 0], rtol=1e-5, atol=1e-6)


def test_faiss_reads_the_features_where_they_lie(monkeypatch):
    faiss = pytest.importorskip("faiss")
    name = "knn_gpu" if DEVICE == "cuda" else "knn"
    search, pointers = getattr(faiss, name), []

    def recording(*arguments, **options):
        pointers.append(arguments[1 if DEVICE == "cuda" else 0].data_ptr())
        return search(*arguments, **options)

    pick_backend("faiss", torch.device(DEVICE), torch.float32, 16)  # makes faiss's functions take tensors
    monkeypatch.setattr(faiss, name, recording)
    features = blobs(300)
    copy = features.clone()
    kmeans(features, 10, iterations=2, backend="faiss")
    assert pointers == [features.data_ptr()] * 3
    assert torch.equal(features, copy)


def test_errors_name_the_numbers():
    features = blobs(30)
    cases = [
        (lambda: kmeans(features, 31), r"k = 31 clusters of 30 points.*--cluster.ks.*30"),
        (lambda: kmeans(features, 0), "k = 0"),
        (lambda: kmeans(features[0], 2), r"features must be \[n, d\] float32 or float16 and contiguous, got \[16\]"),
        (lambda: kmeans(features[:, ::2], 2), r"contiguous, got .*strides \(16, 2\)"),
        (lambda: kmeans(features / (features > 0), 2), "features of rank 0 are not finite: 30 of 30 rows"),
        (lambda: kmeans(features.double(), 2), "float64"),
        (lambda: kmeans(features, 2, iterations=0), "iterations and redo.*0 and 1"),
        (lambda: kmeans(features, 2, split_by="faiss"), 'split_by must be "spread" or "size", got \'faiss\''),
        (lambda: kmeans(features, 2, prune_after=0), "prune_after must be at least 1, or None, got 0"),
        (lambda: kmeans(features, 2, init=features[:3]), r"init must be \[2, 16\].*\[3, 16\]"),
        (lambda: kmeans(features, 2, init=features[:2], redo=2), "redo must be 1, got 2"),
        (lambda: kmeans(features, 2, backend="cuml"), "backends .*'cuml'"),
        (lambda: kmeans(features, 2, init=features[:2] / 0), "init is not finite: 2 of 2 rows"),
        (lambda: kmeans(blobs(30, d=257), 2, backend="triton"), 'd up to 256 for torch.float32 .*got 257.*"torch"'),
        (lambda: cluster(features, (2, 3), temperature=1, init=[features[:2]]), "each of the 2 ks, got 1"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def broken_on_the_second_rank(world):
    features = blobs(20 + world.rank).cpu()
    if world.rank == 1:
        features[3:5, 2] = torch.nan
    with pytest.raises(ValueError, match="features of rank 1 are not finite: 2 of 21 rows"):
        kmeans(features, 4, group=world.group)


def test_broken_features_are_an_error_on_every_rank():
    run_ranks(2, broken_on_the_second_rank)


def test_triton_without_a_gpu_says_how_to_debug(monkeypatch):
    monkeypatch.setattr("pcl_fast.clustering.backends._assign.INTERPRETED", False)
    with pytest.raises(ValueError, match=r'"triton" needs CUDA tensors.*TRITON_INTERPRET=1.*use backend "torch"'):
        kmeans(blobs(30).cpu(), 2, backend="triton")


@pytest.mark.parametrize(
    ("capability", "old_triton", "dtype", "widest"),
    [
        (70, True, torch.float16, 128),
        (70, False, torch.float16, 0),
        (75, False, torch.float16, 0),
        (80, True, torch.float16, 0),
        (80, False, torch.float32, 256),
        (90, False, torch.float16, 256),
        (100, False, torch.float32, 128),
        (121, False, torch.float32, 256),
    ],
)
def test_what_the_default_is_on_which_gpu(capability, old_triton, dtype, widest, monkeypatch):
    module = "pcl_fast.clustering.backends._assign"
    monkeypatch.setattr(f"{module}.INTERPRETED", False)
    monkeypatch.setattr(f"{module}.OLD_TRITON", old_triton)
    monkeypatch.setattr(f"{module}.capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    if widest:
        assert pick_backend("auto", gpu, dtype, widest).nearest is assign.nearest
    assert pick_backend("auto", gpu, dtype, widest + 1).nearest is assign_plain.nearest
    assert pick_backend("auto", gpu, dtype, widest + 1).sums is segment.segment_sums
    with pytest.raises(
        ValueError, match=f"up to {widest} for" if widest else "compute capability 8.0 or newer, or 7.0"
    ):
        pick_backend("triton", gpu, dtype, widest + 1)


@pytest.mark.skipif(DEVICE == "cuda", reason="faiss has threads on a CPU alone")
def test_faiss_takes_no_more_threads_than_pytorch(monkeypatch):
    faiss = pytest.importorskip("faiss")
    pick_backend("faiss", torch.device("cpu"), torch.float32, 16)
    knn, threads = faiss.knn, []

    def counting(*arguments):
        threads.append(faiss.omp_get_max_threads())
        return knn(*arguments)

    monkeypatch.setattr(faiss, "knn", counting)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kmeans(blobs(30), 2, iterations=1, backend="faiss")
    finally:
        torch.set_num_threads(before)
    assert threads[0] == 1


def test_without_triton(monkeypatch):
    for name in ("_assign", "_segment"):
        monkeypatch.setattr(f"pcl_fast.clustering.backends.{name}", None)
    assert kmeans(blobs(30), 2).objective > 0
    with pytest.raises(ValueError, match="package triton, which is not installed"):
        kmeans(blobs(30), 2, backend="triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, where triton is the default")
def test_triton_is_the_default_on_a_gpu_and_gives_the_same_bits():
    features = blobs(5000, d=128, centres=100)
    for x in (features, features.half()):
        default, again, plainly = (kmeans(x, 150, backend=backend) for backend in ("auto", "triton", "torch"))
        assert torch.equal(default.centroids, again.centroids)
        assert torch.equal(default.assignment, again.assignment)
        assert default.objective == pytest.approx(plainly.objective, rel=2e-3)


def test_centroids_carry_no_graph():
    assert not kmeans(blobs(50).requires_grad_(), 3).centroids.requires_grad


def cluster_of_shard(world, features):
    begin = (0, 130, 400)[world.rank]
    end = (130, 400)[world.rank]
    return cluster(features[begin:end], (5, 20), temperature=0.2, iterations=4, seed=1, group=world.group)


def test_cluster_gives_unit_prototypes_and_the_whole_assignment_on_every_rank():
    features = blobs(400).cpu()
    whole = cluster(features, (5, 20), temperature=0.2, iterations=4, seed=1)
    for k, prototypes in zip((5, 20), whole, strict=True):
        torch.testing.assert_close(prototypes.centroids.norm(dim=1).cpu(), torch.ones(k))
        assert prototypes.concentration.mean().item() == pytest.approx(0.2)
        assert prototypes.assignment.shape == (400,)
        assert prototypes.assignment.dtype == torch.int32
    for rank in run_ranks(2, cluster_of_shard, features):
        for ours, one in zip(rank, whole, strict=True):
            assert torch.equal(ours.assignment, one.assignment)
            torch.testing.assert_close(ours.centroids, one.centroids, atol=1e-5, rtol=0)
            torch.testing.assert_close(ours.concentration, one.concentration, atol=0, rtol=1e-4)
