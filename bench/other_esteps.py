"""The E-steps of the other methods, beside scikit-learn's and faiss's way of the same. Run by `make bench`.

- siamese_pcl: PCA-whitening of the backbone's features, and k-means of the whitened ones. scikit-learn has both.
- deepcluster_v2: spherical k-means of a bank of unit features. faiss has it; its E-step without the labels' search, and
  with it.

All begin with centroids of their own choice, run the same iterations of one start, and end with every image's cluster.
On a CPU only: on a GPU k-means is measured in kmeans.py.

Before a provider is timed, the images' mean distance to their centroids must be like that of ours: starts differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import device
import numpy as np
import optional
import pytest
import torch
from clustered import unit_features
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from pcl_fast.clustering import kmeans
from pcl_fast.clustering.lloyd import squared_distance
from pcl_fast.clustering.whitening import pca_whitening

IMAGES, WIDTH, COMPONENTS, PAIRED_K = 20_000, 512, 256, 512
D, HEADS_K, ITERATIONS = 128, 300, 10
SIZES = {"images": IMAGES, "iterations": ITERATIONS, "redo": 1}
ROUNDS, ALIKE = 5, 0.03

pytestmark = [
    pytest.mark.benchmark(timer=device.clock),
    pytest.mark.skipif(device.CUDA, reason="for CPUs: on a GPU k-means is measured in bench/kmeans.py"),
]

Clusters = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # features that were clustered, centroids, assignment


@functools.cache
def backbone_features() -> torch.Tensor:
    return unit_features(IMAGES, PAIRED_K // 2, WIDTH, "cpu")


@functools.cache
def bank() -> torch.Tensor:
    return unit_features(IMAGES, HEADS_K // 2, D, "cpu")


def our_pairs() -> Clusters:
    whitened = pca_whitening(backbone_features(), COMPONENTS).apply(backbone_features(), unit=True)
    found = kmeans(whitened, PAIRED_K, iterations=ITERATIONS, redo=1, seed=0)
    return whitened, found.centroids, found.assignment


def pairs_by_scikit_learn() -> Clusters:
    whitened = PCA(COMPONENTS, whiten=True, svd_solver="covariance_eigh").fit_transform(backbone_features().numpy())
    whitened /= np.linalg.norm(whitened, axis=1, keepdims=True)
    options = {"n_init": 1, "init": "random", "max_iter": ITERATIONS, "tol": 0, "random_state": 0}
    found = KMeans(PAIRED_K, algorithm="lloyd", **options).fit(whitened)
    return tuple(map(torch.from_numpy, (whitened, found.cluster_centers_, found.labels_)))


def our_heads() -> Clusters:
    found = kmeans(bank(), HEADS_K, iterations=ITERATIONS, redo=1, seed=0, spherical=True)
    return bank(), found.centroids, found.assignment


def heads_by_faiss(labels: bool = True) -> Clusters:
    faiss = optional.module("faiss", "faiss-gpu")
    faiss.omp_set_num_threads(torch.get_num_threads())
    found = faiss.Kmeans(D, HEADS_K, niter=ITERATIONS, spherical=True, max_points_per_centroid=IMAGES, seed=0)
    found.train(bank().numpy())
    assignment = found.assign(bank().numpy())[1] if labels else np.zeros(0, np.int64)
    return bank(), torch.from_numpy(found.centroids), torch.from_numpy(assignment)


PROVIDERS: dict[str, dict[str, Callable[[], Clusters]]] = {
    "siamese_pcl": {"scikit-learn": pairs_by_scikit_learn, "ours": our_pairs},
    "deepcluster_v2, a head": {
        "faiss": functools.partial(heads_by_faiss, labels=False),
        "faiss+labels": heads_by_faiss,
        "ours": our_heads,
    },
}
CASES = {
    "siamese_pcl": {"width": WIDTH, "components": COMPONENTS, "K": PAIRED_K},
    "deepcluster_v2, a head": {"width": D, "K": HEADS_K},
}


def mean_distance(clusters: Clusters) -> float:
    features, centroids, assignment = clusters
    return squared_distance(features.float(), centroids.float(), assignment.long()).mean().item()


@pytest.mark.parametrize(("method", "provider"), [(m, p) for m, providers in PROVIDERS.items() for p in providers])
def test_expectation(benchmark, method, provider):
    run = PROVIDERS[method][provider]
    with threadpool_limits(torch.get_num_threads()):
        found = run()
        if len(found[2]):
            assert mean_distance(found) == pytest.approx(mean_distance(PROVIDERS[method]["ours"]()), rel=ALIKE)
        benchmark.group = method
        benchmark.extra_info.update(provider=provider, sizes=SIZES, versions=optional.versions(), case=CASES[method])
        benchmark.pedantic(run, rounds=ROUNDS)
