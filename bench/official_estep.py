"""The E-step as the official code computes it, rebuilt from a description of it: what we measure ourselves against.

One GPU clusters for all of them, granularity by granularity. The features lie on the host, as a numpy array: faiss
copies them to the GPU in every iteration, and averages on the CPU. Another search at the end finds distances and
labels. The concentration is computed by two loops in Python, over the images and over the clusters.

Without a GPU it does the same with faiss's index for the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import optional
import torch
import torch.nn.functional as F

from pcl_fast.clustering import PrototypeSet

ALPHA = 10


@functools.cache
def resources():
    """Return faiss's resources, which take 1.5 GB of the GPU's memory. The official code makes them anew for every
    granularity; here they are made once.
    """
    return optional.module("faiss", "faiss-gpu").StandardGpuResources()


def flat_index(d: int):
    """Return faiss's exact index, on the GPU if there is one."""
    faiss = optional.module("faiss", "faiss-gpu")
    if not torch.cuda.is_available():
        return faiss.IndexFlatL2(d)
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = False
    config.device = torch.cuda.current_device()
    return faiss.GpuIndexFlatL2(resources(), d, config)


def kmeans(
    features: np.ndarray,
    k: int,
    *,
    iterations: int = 20,
    redo: int = 5,
    seed: int = 0,
    init: np.ndarray | None = None,
    max_points_per_centroid: int = 1000,
) -> tuple:
    """Return (centroids [k, d] float32, faiss's index of them) for features [n, d] float32."""
    faiss = optional.module("faiss", "faiss-gpu")
    d = features.shape[1]
    clustering = faiss.Clustering(d, k)
    clustering.niter, clustering.nredo, clustering.seed = iterations, redo, seed
    clustering.max_points_per_centroid, clustering.min_points_per_centroid = max_points_per_centroid, 10
    clustering.spherical = False
    if init is not None:
        faiss.copy_array_to_vector(init.ravel(), clustering.centroids)
    index = flat_index(d)
    clustering.train(features, index)
    return faiss.vector_to_array(clustering.centroids).reshape(k, d), index


def concentration(distance: np.ndarray, assignment: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """Return the concentration [k], from squared distances [n] float32 and assignment [n]."""
    members: list[list[np.float32]] = [[] for _ in range(k)]
    for image, cluster in enumerate(assignment):
        members[int(cluster)].append(distance[image])
    density = np.zeros(k)
    for cluster, distances in enumerate(members):
        if len(distances) > 1:
            density[cluster] = np.mean(np.sqrt(np.asarray(distances))) / np.log(len(distances) + ALPHA)
    largest = density.max()
    for cluster, distances in enumerate(members):
        if len(distances) <= 1:
            density[cluster] = largest
    density = np.clip(density, np.percentile(density, 10), np.percentile(density, 90))
    return density * (temperature / density.mean())


def cluster(
    features: np.ndarray,
    ks: Sequence[int],
    *,
    temperature: float,
    iterations: int = 20,
    redo: int = 5,
    init: Sequence[np.ndarray] | None = None,
    device: str = "cpu",
) -> list[PrototypeSet]:
    """Do what `pcl_fast.clustering.cluster` does, for features [n, d] on the host; the prototypes end on the device."""
    prototypes = []
    for m, k in enumerate(ks):
        start = None if init is None else init[m]
        centroids, index = kmeans(features, k, iterations=iterations, redo=redo, seed=m, init=start)
        distance, assignment = (found[:, 0] for found in index.search(features, 1))
        density = concentration(distance, assignment, k, temperature)
        prototypes.append(
            PrototypeSet(
                F.normalize(torch.from_numpy(centroids).to(device), dim=1),
                torch.from_numpy(density).float().to(device),
                torch.from_numpy(assignment.astype(np.int32)).to(device),
            )
        )
    return prototypes
