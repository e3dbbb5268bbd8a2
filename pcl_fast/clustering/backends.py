"""What k-means leaves to a backend: finding each point's nearest centroid, and adding up clusters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

from pcl_fast.errors import MissingPackageError
from pcl_fast.kernels import assign_plain, segment_plain

# There is no triton for macOS.
_assign, _segment = (
    import_module(f"pcl_fast.kernels.{name}") if find_spec("triton") else None for name in ("assign", "segment")
)


class Backend(NamedTuple):
    """nearest: (features [n, d], centroids [k, d]) -> integers [n].

    sums: (values [n, d], assignment [n], k, out [k, d] or None) -> (sums [k, d] float32, counts [k] int64).
    """

    nearest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    sums: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def pick_backend(name: str, device: torch.device, dtype: torch.dtype, dim: int) -> Backend:
    """The backend for features of this type and length `dim` on this device.

    Raises:
        ValueError: no such backend, or it cannot be used for these features.
        MissingPackageError: faiss is asked for and not installed.
    """
    if name not in ("auto", "triton", "faiss", "torch"):
        raise ValueError(f'k-means has the backends "auto", "triton", "faiss" and "torch", not {name!r}')
    if name == "faiss":
        return Backend(_load_faiss(), pick_sums(device))
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        reason = obstacle(device, dtype, dim)
        if reason is None:
            return Backend(_assign.nearest, _segment.segment_sums)
        if name == "triton":
            raise ValueError(f'k-means backend "triton" {reason}; use backend "torch"')
    return Backend(assign_plain.nearest, pick_sums(device))


def pick_sums(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """On a GPU the kernel, wherever Triton is: the same bits every time."""
    return _segment.segment_sums if device.type == "cuda" and _segment is not None else segment_plain.segment_sums


def obstacle(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """Why backend "triton" cannot be used, or None."""
    if _assign is None:
        return "needs the package triton, which is not installed"
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
            # In place: faiss reads PyTorch's memory and writes to it. It wants one type for both.
            with torch.cuda.device(features.device):
                arguments = _gpu_resources(features.device), features, centroids.to(features.dtype), 1
                return faiss.knn_gpu(*arguments, device=features.device.index)[1].view(-1)
        faiss.omp_set_num_threads(torch.get_num_threads())  # it would take all cores, on every rank
        rows = max(1, (1 << 24) // features.shape[1])  # on a CPU it knows no float16: converted piece by piece
        return torch.cat([faiss.knn(chunk.float(), centroids, 1)[1].view(-1) for chunk in features.split(rows)])

    return nearest


@functools.cache
def _gpu_resources(device: torch.device) -> object:
    """Kept, with less scratch memory than the 1.5 GB that faiss would take beside PyTorch's."""
    import faiss

    resources = faiss.StandardGpuResources()
    resources.setTempMemory(512 << 20)
    return resources
