"""The E-step on given features: k-means for every granularity, concentration and prototypes. Run by `make bench`.

On a GPU it has the paper's sizes: 1,281,167 images into 25k, 50k and 100k clusters, 20 iterations, 5 starts. Only ours
runs all of that. The others run 5 iterations of one start, and so does ours. How long the official code would take for
the paper's E-step is estimated (`estimated_paper_ms`) by a straight line through its times for one and for two starts
of 20 iterations. (A line through numbers of iterations would be too low, because the first iterations of every start
take longest.) On a CPU the case is small, and the official code runs all of it, so that the estimate can be checked.

flash-kmeans and flashlib have no E-step; their iterations are measured in kmeans.py.

Before anything is timed, one iteration from the same start must leave the images as near to their prototypes as plain
PyTorch in float32 does.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import device
import official_estep
import optional
import pytest
import torch
from clustered import TOLERANCE, mean_distance, some_points, unit_features

from pcl_fast.clustering import PrototypeSet, cluster

D, TEMPERATURE = 128, 0.2
IMAGES, KS = (1_281_167, (25_000, 50_000, 100_000)) if device.CUDA else (20_000, (100, 200))
SIZES = {"d": D, "N": IMAGES, "K": KS}
DEVICE = "cuda" if device.CUDA else "cpu"
DTYPE = torch.float16 if device.CUDA else torch.float32  # as in FeatureShard

pytestmark = pytest.mark.benchmark(timer=device.clock)


class Case(NamedTuple):
    iterations: int
    redo: int

    def __str__(self) -> str:
        return f"{self.iterations} iterations, redo {self.redo}"

    def describe(self) -> dict:
        """Return what the record says about the case. It has no rate: on these features, which have clusters, some
        starts end before their last iteration.
        """
        return {
            "iterations": self.iterations,
            "redo": self.redo,
            "bytes_all_reduced_per_iteration": sum(4 * (k * D + k + 1) for k in KS),
        }


ONE, SHORT, PAPER = Case(1, 1), Case(5, 1), Case(20, 5)
ONE_START, TWO_STARTS = (PAPER._replace(redo=starts) for starts in (1, 2))
ROUNDS = 1 if device.CUDA else 5

Prototypes = list[PrototypeSet]


@functools.cache
def features() -> torch.Tensor:
    return unit_features(IMAGES, max(KS) // 2, D, DEVICE)


@functools.cache
def starts() -> list[torch.Tensor]:
    return [some_points(features(), k) for k in KS]


def official(case: Case, same_start: bool) -> Callable[[], Prototypes]:
    """Return the official E-step, whose features are on the host already."""
    optional.module("faiss", "faiss-gpu").omp_set_num_threads(torch.get_num_threads())
    init = [start.cpu().numpy() for start in starts()] if same_start else None
    options = {"temperature": TEMPERATURE, "iterations": case.iterations, "redo": case.redo, "device": DEVICE}
    return partial(official_estep.cluster, features().cpu().numpy(), KS, init=init, **options)


def ours(backend: str, dtype: torch.dtype, case: Case, same_start: bool) -> Callable[[], Prototypes]:
    if backend == "faiss":
        optional.module("faiss", "faiss-gpu")
    init = starts() if same_start else None
    options = {"temperature": TEMPERATURE, "iterations": case.iterations, "redo": case.redo, "backend": backend}
    return partial(cluster, features().to(dtype), KS, init=init, **options)


PROVIDERS: dict[str, Callable[[Case, bool], Callable[[], Prototypes]]] = {
    "official": official,
    "faiss": partial(ours, "faiss", torch.float32),
    "torch": partial(ours, "torch", DTYPE),
    "triton": partial(ours, "triton", DTYPE),
}


def providers(case: Case) -> list[str]:
    if not device.CUDA:
        return ["official", "faiss", "torch"]
    return list(PROVIDERS) if case == SHORT else ["triton"]


def mean_distances(prototypes: Prototypes) -> list[float]:
    return [mean_distance(features(), granularity.centroids, granularity.assignment) for granularity in prototypes]


@functools.cache
def expected_distances() -> list[float]:
    return mean_distances(ours("torch", torch.float32, ONE, True)())


@pytest.mark.parametrize(
    ("case", "provider"), [(case, name) for case in (SHORT, PAPER) for name in providers(case)], ids=str
)
def test_estep(benchmark, case, provider):
    expected = expected_distances()
    one = PROVIDERS[provider](ONE, True)
    assert mean_distances(one()) == pytest.approx(expected, rel=TOLERANCE)

    benchmark.group = str(case)
    timed = PROVIDERS[provider](case, False)
    device.flush_cache()  # so that its own memory is allocated before the provider's is counted
    _, memory = device.peak_bytes(partial(benchmark.pedantic, timed, setup=device.flush_cache, rounds=ROUNDS))
    benchmark.extra_info.update(provider=provider, sizes=SIZES, versions=optional.versions(), case=case.describe())
    if provider in ("official", "faiss"):  # whose memory PyTorch does not count
        memory = None
    benchmark.extra_info["peak_extra_bytes"] = memory
    if provider == "official" and case == SHORT and benchmark.enabled:
        benchmark.extra_info["figures"] = estimate(*(median_of_official(starts) for starts in (ONE_START, TWO_STARTS)))


def median_of_official(case: Case) -> float:
    """Return how long the official code takes for a case, in seconds."""
    return statistics.median(device.seconds(official(case, False)) for _ in range(ROUNDS))


def estimate(one_start: float, two_starts: float) -> dict:
    """Estimate the time of the paper's E-step from the seconds that one and two starts take."""
    return {
        "one_start_ms": round(1e3 * one_start, 4),
        "two_starts_ms": round(1e3 * two_starts, 4),
        "estimated_paper_ms": round(1e3 * (one_start + (PAPER.redo - 1) * (two_starts - one_start)), 4),
    }
