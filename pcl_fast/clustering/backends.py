"""What k-means leaves to a backend: finding each point's nearest centroid, and adding up clusters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

from pcl_fast.clustering.bounds import WORTHWHILE, BoundedSearch
from pcl_fast.errors import MissingPackageError
from pcl_fast.kernels import assign_plain, segment_plain, switches

# Triton does not exist for macOS.
_assign, _segment = (
    import_module(f"pcl_fast.kernels.{name}") if find_spec("triton") else None for name in ("assign", "segment")
)


class Backend(NamedTuple):
    """The two functions that k-means calls, and how it searches.

    nearest: (features [n, d], centroids [k, d]) -> integers [n], the index of each point's nearest centroid.
    sums: (values [n, d], assignment [n], k, out [k, d] or None) -> (sums [k, d] float32, counts [k] int64) of every
        cluster.
    keeps_bounds: whether bounds may save the search comparisons whose outcome is known (see `begin_search`).
    """

    nearest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    sums: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    keeps_bounds: bool = False

    def begin_search(self, features: torch.Tensor, k: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function (centroids [k, d]) -> integers [n], to be called while these centroids move: the nearest
        centroids of the same points. Where that is worth while it remembers what need not be compared again.
        """
        if self.keeps_bounds and len(features) * k >= WORTHWHILE:
            return BoundedSearch(features, k)
        return functools.partial(self.nearest, features)


def pick_backend(name: str, device: torch.device, dtype: torch.dtype, dim: int) -> Backend:
    """Return the backend for features of this type and length `dim` on this device.

    Args:
        name: "auto", "triton", "faiss" or "torch".
        device, dtype, dim: where the features are, their type, and their length d.

    Raises:
        ValueError: there is no such backend, or it cannot be used for these features.
        MissingPackageError: faiss is asked for and not installed.
    """
    if name not in ("auto", "triton", "faiss", "torch"):
        raise ValueError(f'k-means has the backends "auto", "triton", "faiss" and "torch", not {name!r}')
    if name == "faiss":
        return Backend(_load_faiss(), pick_sums(device))
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        reason = obstacle(device, dtype, dim)
        if reason is None:
            return Backend(_assign.nearest, (segment_plain if switches.is_off("segment") else _segment).segment_sums)
        if name == "triton":
            raise ValueError(f'k-means backend "triton" {reason}; use backend "torch"')
    return Backend(assign_plain.nearest, pick_sums(device), keeps_bounds=device.type == "cpu")


def pick_sums(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return the function that adds up clusters: on a GPU, if Triton is installed, the kernel, whose sums have the same
    bits every time.
    """
    fused = device.type == "cuda" and _segment is not None and not switches.is_off("segment")
    return _segment.segment_sums if fused else segment_plain.segment_sums


def obstacle(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Return why backend "triton" cannot be used for such features on this device, or None if it can."""
    if _assign is None:
        return "needs the package triton, which is not installed"
    if switches.is_off("assign"):
        return "is switched off, because its kernels were found wrong on this run's GPUs"
    if device.type != "cuda" and not _assign.INTERPRETED:
        return (
            f"needs CUDA tensors, features are on {device} (to debug the kernels without a GPU, set "
            "TRITON_INTERPRET=1 before Python starts)"
        )
    widest = _assign.widest(dtype, device)
    if not widest:
        return f"needs a GPU of compute capability 8.0 or newer, or 7.0 and Triton 3.1, which {device} is not"
    return f"takes d up to {widest} for {dtype} on {device}, got {dim}" if dim > widest else None


def _load_faiss() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    try:
        import faiss
        import faiss.contrib.torch_utils
    except ImportError as error:
        raise MissingPackageError(
            'k-means backend "faiss" needs the package faiss-gpu (see requirements/); backend "torch" does not'
        ) from error

    def nearest(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        if not len(features):
            return torch.empty(0, dtype=torch.int64, device=features.device)
        if features.is_cuda:
            # faiss reads and writes PyTorch's memory in place. It needs both tensors in one type.
            with torch.cuda.device(features.device):
                arguments = _gpu_resources(features.device), features, centroids.to(features.dtype), 1
                return faiss.knn_gpu(*arguments, device=features.device.index)[1].view(-1)
        faiss.omp_set_num_threads(torch.get_num_threads())  # otherwise it takes all cores, on every rank
        rows = max(1, (1 << 24) // features.shape[1])  # in chunks, as float16 must become float32 on a CPU
        return torch.cat([faiss.knn(chunk.float(), centroids, 1)[1].view(-1) for chunk in features.split(rows)])

    return nearest


@functools.cache
def _gpu_resources(device: torch.device) -> object:
    """Return faiss's resources on a GPU, always the same ones. They have 512 MB of scratch memory, less than the 1.5 GB
    that faiss would take beside PyTorch's memory.
    """
    import faiss

    resources = faiss.StandardGpuResources()
    resources.setTempMemory(512 << 20)
    return resources
