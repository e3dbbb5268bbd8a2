"""k-means and the concentration. Run by `make bench`.

On a GPU this times one iteration of Lloyd's algorithm, and its search and its update by themselves, for every provider
in lloyd_providers.py, at ImageNet's sizes and at flash-kmeans' own. faiss searches in float32 whatever the features'
type. There are no cases with fewer than 4 points per cluster. An iteration here leaves out what k-means does between
two: it does not see whether anything changed, and does not split clusters. On a CPU this times 20 iterations of faiss's
own k-means, of SuperKMeans and of ours, and records their objectives. On both it times the concentration of 25k
clusters of ImageNet, by the official code's loops and by ours.

All providers but SuperKMeans start from the same points. Before a provider is timed, the points' mean distance to the
centroids that it found must equal that of plain PyTorch in float32 (on a CPU the objective must be like that of ours).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import device
import official_estep
import optional
import pytest
import torch
from clustered import TOLERANCE, mean_distance, some_points, unit_features
from lloyd_providers import STAGES, step
from pcl_fast.kernels import assign_plain

from pcl_fast.clustering import concentration, kmeans
from pcl_fast.clustering.lloyd import squared_distance

D, IMAGES, TEMPERATURE = 128, 1_281_167, 0.2
SIZES = {"d": D}
DEVICE = "cuda" if device.CUDA else "cpu"
POINTS, KS = (100_000, IMAGES), (1000, 25_000, 50_000, 100_000)
FEWEST = 4  # points per cluster that are worth clustering
# flash-kmeans' own largest ones, in half precision: 385 and 407 TFLOP/s with Triton, 464 and 490 with CuTe on an H200,
# by its repository's tables (bf16).
FLASH_SHAPES = ((1 << 20, 200_000), (5_000_000, 65_536))
SECONDS, MOST_ROUNDS = 0.5, 30
CPU_SHAPES, ITERATIONS = ((20_000, 100), (20_000, 200), (100_000, 1000), (200_000, 5000)), 20
CONCENTRATION_K = 25_000

pytestmark = pytest.mark.benchmark(timer=device.clock)


class Case(NamedTuple):
    points: int
    clusters: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"N={self.points}, K={self.clusters}, {str(self.dtype).removeprefix('torch.')}"

    def describe(self, stage: str = "iteration", iterations: int = 1) -> dict:
        """Return what the record says about the case. The floor of an update is to read every point once."""
        floor_bytes = self.points * D * self.dtype.itemsize + 4 * self.clusters * D
        flop = 2 * self.points * self.clusters * D * iterations
        return {
            "N": self.points,
            "K": self.clusters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "iterations": iterations,
            "bytes_all_reduced_per_iteration": 4 * (self.clusters * D + self.clusters + 1),
            **({"floor_bytes": floor_bytes} if stage == "update" else {"flop": flop}),
        }


def cases() -> list[Case]:
    if not device.CUDA:
        return []
    shapes = [(points, k) for points in POINTS for k in KS if points >= FEWEST * k]
    ours = [Case(*shape, dtype) for shape in shapes for dtype in (torch.float16, torch.float32)]
    return ours + [Case(*shape, torch.float16) for shape in FLASH_SHAPES]


def providers(case: Case, stage: str) -> list[str]:
    """Return the providers that are measured for a case. Plain PyTorch searches in float32 whatever the features' type,
    so it is left out of float16's searches.
    """
    half, searches = case.dtype == torch.float16, stage != "update"
    # Of the two in CuTe, updates are those in Triton. To tune itself for a shape takes each longer than all the rest of
    # the case.
    cute = half and searches and case.points != min(POINTS)
    suits = {
        # A second or more at flash-kmeans' shapes, in float32.
        "faiss": searches and (case.points, case.clusters) not in FLASH_SHAPES,
        "torch": not half or not searches,
        "flash-kmeans": half,
        "flash-kmeans-cute": cute,
        "flashlib": half,
        "flashlib-cute": cute,
        "triton": True,
    }
    return [name for name, suitable in suits.items() if suitable]


@functools.lru_cache(maxsize=1)
def problem(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (features [N, d], centroids [K, d] float32). There are twice as many centroids as the features have
    directions.
    """
    features = unit_features(case.points, case.clusters // 2, D, DEVICE).to(case.dtype)
    return features, some_points(features, case.clusters)


def distance_of(case: Case, stage: str, result: torch.Tensor) -> float:
    """Return the points' mean distance to the centroids that a search assigned, or to the nearest of the new ones."""
    features, centroids = problem(case)
    if stage == "assignment":
        return mean_distance(features, centroids, result.view(-1))
    return mean_distance(features, result.view(centroids.shape).to(features.device))


@functools.lru_cache(maxsize=len(STAGES))
def expected_distance(case: Case, stage: str) -> float:
    return distance_of(case, stage, step(stage, "torch", *problem(case))())


@pytest.mark.parametrize(
    ("case", "stage", "provider"),
    [(case, stage, name) for case in cases() for stage in STAGES for name in providers(case, stage)],
    ids=str,
)
def test_lloyd(benchmark, case, stage, provider):
    expected = expected_distance(case, stage)
    timed = step(stage, provider, *problem(case))
    assert distance_of(case, stage, timed()) == pytest.approx(expected, rel=TOLERANCE)
    memory = device.peak_bytes(timed)[1]
    benchmark.group = f"{case}, {stage}"
    benchmark.extra_info.update(provider=provider, sizes=SIZES, versions=optional.versions(), case=case.describe(stage))
    if provider == "faiss":  # whose memory PyTorch does not count
        benchmark.extra_info["figures"] = {"dtype": "float32"}
    else:
        benchmark.extra_info["peak_extra_bytes"] = memory
    rounds = device.rounds_for(timed, SECONDS, MOST_ROUNDS)
    benchmark.pedantic(timed, setup=device.flush_cache, rounds=rounds)


def faiss_kmeans(features: torch.Tensor, init: torch.Tensor, labels: bool = False) -> torch.Tensor:
    """Return the centroids of faiss's own k-means of all points (by default it takes 256 points per cluster). With
    `labels`, it also searches for the points' nearest centroids at the end.
    """
    faiss = optional.module("faiss", "faiss-gpu")
    faiss.omp_set_num_threads(torch.get_num_threads())
    kmeans = faiss.Kmeans(D, len(init), niter=ITERATIONS, max_points_per_centroid=len(features))
    kmeans.train(features.numpy(), init_centroids=init.numpy())
    if labels:
        kmeans.assign(features.numpy())
    return torch.from_numpy(kmeans.centroids)


def super_kmeans(features: torch.Tensor, init: torch.Tensor, **options) -> torch.Tensor:
    """Return the centroids of SuperKMeans, which starts from points of its own choice. By default it does less than the
    others: centroids of centroids, and an early end.
    """
    superkmeans = optional.module("superkmeans", "superkmeans")
    found = superkmeans.SuperKMeans(len(init), D, n_threads=torch.get_num_threads(), **options)
    return torch.from_numpy(found.train(features.numpy()))


def super_kmeans_of_all(features: torch.Tensor, init: torch.Tensor) -> torch.Tensor:
    """Return SuperKMeans' centroids after the same work as the others: all points, all iterations, one level."""
    same = {"iters": ITERATIONS, "sampling_fraction": 1.0, "max_points_per_cluster": len(features)}
    return super_kmeans(features, init, hierarchical=False, early_termination=False, **same)


def our_kmeans(features: torch.Tensor, init: torch.Tensor) -> torch.Tensor:
    """Return the centroids of our k-means, which searches for the points' nearest ones at the end, too."""
    return kmeans(features, len(init), iterations=ITERATIONS, init=init).centroids


KMEANS: dict[str, Callable] = {
    "faiss": faiss_kmeans,
    "faiss+labels": functools.partial(faiss_kmeans, labels=True),
    "superkmeans": super_kmeans_of_all,
    "superkmeans, its defaults": super_kmeans,
    "ours": our_kmeans,
}


@pytest.mark.skipif(device.CUDA, reason="for CPUs: faiss.Kmeans on a GPU is part of bench/estep.py")
@pytest.mark.parametrize(
    ("case", "provider"), [(Case(*shape, torch.float32), name) for shape in CPU_SHAPES for name in KMEANS], ids=str
)
def test_kmeans(benchmark, case, provider):
    features, init = problem(case)
    found, expected = objective_of(case, provider), objective_of(case, "ours")
    # Not more alike: starts, ends and what becomes of empty clusters are each one's own.
    assert found == pytest.approx(expected, rel=0.1 if provider.endswith("defaults") else 0.03)
    benchmark.group = f"{case}, {ITERATIONS} iterations"
    benchmark.extra_info.update(
        provider=provider, sizes=SIZES, versions=optional.versions(), case=case.describe(iterations=ITERATIONS)
    )
    benchmark.extra_info["figures"] = {"objective": round(found, 2)}
    # Half a minute a round.
    rounds = 3 if case.points * case.clusters > 10**9 / 2 else 7
    benchmark.pedantic(KMEANS[provider], args=(features, init), rounds=rounds)


@functools.cache
def objective_of(case: Case, provider: str) -> float:
    """Return the sum of squared distances to the nearest of the centroids that a provider finds."""
    features, init = problem(case)
    centroids = KMEANS[provider](features, init)
    return squared_distance(features, centroids, assign_plain.nearest(features, centroids)).double().sum().item()


def official_concentration(distance: torch.Tensor, assignment: torch.Tensor) -> Callable[[], torch.Tensor]:
    arguments = distance.cpu().numpy(), assignment.cpu().numpy(), CONCENTRATION_K, TEMPERATURE
    return lambda: torch.from_numpy(official_estep.concentration(*arguments))


def our_concentration(distance: torch.Tensor, assignment: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: concentration(distance, assignment, CONCENTRATION_K, temperature=TEMPERATURE)


CONCENTRATION = {"official": official_concentration, "ours": our_concentration}


@pytest.mark.parametrize("provider", CONCENTRATION)
def test_concentration(benchmark, provider):
    generator = torch.Generator().manual_seed(0)
    distance = torch.rand(IMAGES, generator=generator).to(DEVICE)
    assignment = torch.randint(CONCENTRATION_K, (IMAGES,), generator=generator, dtype=torch.int32).to(DEVICE)
    timed = CONCENTRATION[provider](distance, assignment)
    expected = our_concentration(distance.cpu(), assignment.cpu())()
    torch.testing.assert_close(timed().cpu().float(), expected, rtol=TOLERANCE, atol=0)
    memory = device.peak_bytes(timed)[1]
    benchmark.group = f"concentration, N={IMAGES}, K={CONCENTRATION_K}"
    case = {"N": IMAGES, "K": CONCENTRATION_K}
    benchmark.extra_info.update(provider=provider, sizes=SIZES, versions=optional.versions(), case=case)
    benchmark.extra_info["peak_extra_bytes"] = memory
    benchmark.pedantic(timed, setup=device.flush_cache, rounds=device.rounds_for(timed, 10, MOST_ROUNDS))
