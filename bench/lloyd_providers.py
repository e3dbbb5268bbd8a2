"""The ways to compute an iteration of Lloyd's algorithm on a GPU that are measured: what a user would run otherwise,
then ours.

All get the same features [N, d] and centroids [K, d] float32, and return integers [N] and new centroids [K, d].
flash-kmeans and flashlib are optional packages; they need a batch as the first dimension, and centroids of the
features' type. Work that only the first iteration of a k-means must do (squared norms of the points, buffers) is done
before and not timed, for every provider.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import official_estep
import optional
import pytest
import torch
from pcl_fast.kernels import assign_plain, segment_plain

from pcl_fast.clustering import pick_backend

STAGES = ("assignment", "update", "iteration")


class Lloyd(NamedTuple):
    """A provider's search (-> assignment [N]) and its update (assignment -> new centroids), if it has one."""

    assign: Callable[[], torch.Tensor]
    update: Callable[[torch.Tensor], torch.Tensor] | None


def with_means(nearest: Callable, sums: Callable, features: torch.Tensor, centroids: torch.Tensor) -> Lloyd:
    """Return the search, and an update that makes means of sums as pcl_fast/clustering/lloyd.py does."""

    def update(assignment: torch.Tensor) -> torch.Tensor:
        total, counts = sums(features, assignment, len(centroids))
        return torch.where(counts[:, None] == 0, centroids, total / counts[:, None].clamp(min=1))

    return Lloyd(partial(nearest, features, centroids), update)


def torch_lloyd(features: torch.Tensor, centroids: torch.Tensor) -> Lloyd:
    return with_means(assign_plain.nearest, segment_plain.segment_sums, features, centroids)


def triton_lloyd(features: torch.Tensor, centroids: torch.Tensor) -> Lloyd:
    backend = pick_backend("triton", features.device, features.dtype, features.shape[1])
    return with_means(backend.nearest, backend.sums, features, centroids)


def faiss_lloyd(features: torch.Tensor, centroids: torch.Tensor) -> Lloyd:
    """Return faiss's search on PyTorch's memory, always in float32; there is no update."""
    optional.module("faiss", "faiss-gpu")
    features = features.float()
    search = pick_backend("faiss", features.device, features.dtype, features.shape[1]).nearest
    return Lloyd(partial(search, features, centroids), None)


def faiss_iteration(features: torch.Tensor, centroids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return an iteration as faiss's own k-means does it: in float32, with the points on the host, where it averages
    too.
    """
    host, start = features.float().cpu().numpy(), centroids.cpu().numpy()
    options = {"iterations": 1, "redo": 1, "init": start, "max_points_per_centroid": len(host)}
    return lambda: torch.from_numpy(official_estep.kmeans(host, len(start), **options)[0])


def flash_kmeans_lloyd(features: torch.Tensor, centroids: torch.Tensor) -> Lloyd:
    assigning = optional.module("flash_kmeans.assign_euclid_triton", "flash-kmeans")
    updating = optional.module("flash_kmeans.centroid_update_triton", "flash-kmeans")
    points, start = features[None], centroids.to(features.dtype)[None]
    squares = squared_norms(features)[None]
    return Lloyd(
        partial(assigning.euclid_assign_triton, points, start, squares),
        partial(updating.triton_centroid_update_sorted_euclid, points, old_centroids=start),
    )


def flashlib_lloyd(features: torch.Tensor, centroids: torch.Tensor) -> Lloyd:
    assigning = optional.module("flashlib.primitives.kmeans.triton.assign", "flashlib")
    updating = optional.module("flashlib.primitives.kmeans.triton.update", "flashlib")
    points, start = features[None], centroids.to(features.dtype)[None]
    buffers = {
        "sums_buf": torch.empty(start.shape, device=start.device),
        "cnts_buf": torch.empty(start.shape[:2], device=start.device, dtype=torch.int32),
        "new_buf": torch.empty_like(start),
        "shift_buf": torch.empty(start.shape[:2], device=start.device),
    }
    return Lloyd(
        partial(assigning.euclid_assign_triton, points, start),
        lambda ids: updating.triton_lloyd_centroid_step_euclid(points, ids, start, **buffers)[0],
    )


def flashlib_cute_lloyd(features: torch.Tensor, centroids: torch.Tensor) -> Lloyd:
    """Return flashlib's kernel for Hopper in CuTe DSL, which it tunes for every shape (20 s)."""
    optional.module("cutlass.cute", "nvidia-cutlass-dsl")
    assigning = optional.module("flashlib.primitives.kmeans.cutedsl.assign", "flashlib")
    refuse_triton(assigning, "flashlib")
    points, start = features[None], centroids.to(features.dtype)[None]
    return Lloyd(partial(assigning.cutedsl_assign_euclid, points, start), flashlib_lloyd(features, centroids).update)


def flash_kmeans_cute_lloyd(features: torch.Tensor, centroids: torch.Tensor) -> Lloyd:
    """Return flash-kmeans' kernel for Hopper in CuTe DSL, of which flashlib's is a later one. It is in no release up to
    0.3.1; install the repository at a commit that has flash_kmeans/cutedsl_impl.py.
    """
    optional.module("cutlass.cute", "nvidia-cutlass-dsl")
    package = "flash-kmeans from its repository (releases up to 0.3.1 have no CuTe)"
    assigning = optional.module("flash_kmeans.cutedsl_impl", package)
    refuse_triton(assigning, "flash-kmeans")
    points, start = features[None], centroids.to(features.dtype)[None]
    search = partial(assigning.cutedsl_assign_euclid, points, start, squared_norms(features)[None])
    return Lloyd(search, flash_kmeans_lloyd(features, centroids).update)


def refuse_triton(assigning: ModuleType, package: str) -> None:
    """Leave a case out where this module would run the package's Triton kernel, without a word, instead of CuTe's."""

    def refuse(*_, **__):
        pytest.skip(f"{package} has no kernel in CuTe for this case or this GPU, and would take its Triton kernel")

    assigning.euclid_assign_triton = refuse


def squared_norms(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([chunk.float().square().sum(1) for chunk in features.split(1 << 18)])


PROVIDERS: dict[str, Callable[[torch.Tensor, torch.Tensor], Lloyd]] = {
    "faiss": faiss_lloyd,
    "torch": torch_lloyd,
    "flash-kmeans": flash_kmeans_lloyd,
    "flash-kmeans-cute": flash_kmeans_cute_lloyd,
    "flashlib": flashlib_lloyd,
    "flashlib-cute": flashlib_cute_lloyd,
    "triton": triton_lloyd,
}


def step(stage: str, provider: str, features: torch.Tensor, centroids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return the function to time, which returns the assignment, or the new centroids."""
    if (provider, stage) == ("faiss", "iteration"):
        return faiss_iteration(features, centroids)
    assign, update = PROVIDERS[provider](features, centroids)
    if stage == "assignment":
        return assign
    if stage == "update":
        return partial(update, assign())
    return lambda: update(assign())
