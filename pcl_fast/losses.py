"""InfoNCE and ProtoNCE (equations 1 and 11 of the paper).

Keys, queue and prototypes are constants: the only gradient is with respect to the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pcl_fast.clustering.types import PrototypeSet
from pcl_fast.kernels import reference


class ContrastResult(NamedTuple):
    """Per row: loss [N] float32 (float64 for a float64 query), and correct [N] bool, whether the positive scored
    strictly above every negative.
    """

    loss: torch.Tensor
    correct: torch.Tensor


class ProtoNCEResult(NamedTuple):
    """loss: scalar, mean InfoNCE + mean over granularities of mean ProtoNCE; and its parts, row by row."""

    loss: torch.Tensor
    instance: ContrastResult
    prototype: list[ContrastResult]


def info_nce(
    query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, temperature: float, *, backend: str = "auto"
) -> ContrastResult:
    """Equation 1: loss_i = -log( exp(q_i.k_i/tau) / (exp(q_i.k_i/tau) + sum_j exp(q_i.queue_j/tau)) ).

    Args:
        query: [N, d] unit features, any floating dtype; sums are taken in float32.
        key: [N, d] momentum features of the other view.
        queue: [R, d] keys of earlier batches.
        temperature: tau > 0.
        backend: "torch", or "auto", the fastest for the device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, temperature <= 0, or an unknown backend.
    """
    _check_backend(backend)
    _check_rows("query", query)
    _check_like("key", key, query, len(query))
    _check_like("queue", queue, query)
    _check_positive("temperature", temperature)
    with _full_precision(query):
        return ContrastResult(*reference.contrast(query, key, 1 / temperature, queue, 1 / temperature))


def proto_nce(
    query: torch.Tensor,
    prototypes: PrototypeSet,
    index: torch.Tensor,
    num_negatives: int | None,
    *,
    seed: int | torch.Tensor,
    backend: str = "auto",
) -> ContrastResult:
    """Equation 11, one granularity: each query against its own prototype and r others, scores q.c over c's phi.

    Negatives of row i are the r prototypes of `sample_negatives`, and the prototypes of the batch's other rows, one
    column per other row; a row that shares i's prototype (a twin) adds none.

    Args:
        query: [N, d] unit features, any floating dtype; sums are taken in float32.
        prototypes: centroids [K, d], concentration [K], assignment [n].
        index: int64 [N], positions of the rows' images in the data set, in [0, n).
        num_negatives: r; None, or more than exist: all.
        seed: of the draw; int, or 0-d int64 tensor (reading it from a GPU waits for the GPU).
        backend: see `info_nce`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, r < 1, an unknown backend, or (on CPU, where looking
            costs nothing) an index out of range.
    """
    _check_backend(backend)
    _check_rows("query", query)
    _check_prototypes(prototypes, query)
    _check_index(index, query, len(prototypes.assignment))
    positives = prototypes.assignment[index].long()
    negatives = sample_negatives(len(prototypes.centroids), num_negatives, positives, seed=seed)
    columns = torch.cat([positives, negatives])
    weight = 1 / prototypes.concentration
    # Hidden: the rows' columns that are a row's own prototype, which the sampled ones cannot be.
    twin = positives[:, None] == positives
    with _full_precision(query):
        return ContrastResult(
            *reference.contrast(
                query,
                prototypes.centroids.index_select(0, positives),
                weight[positives],
                prototypes.centroids.index_select(0, columns),  # a quarter of the time of [columns] on a CPU
                weight[columns],
                twin,
            )
        )


def sample_negatives(
    num_prototypes: int, num_negatives: int | None, positives: torch.Tensor, *, seed: int | torch.Tensor
) -> torch.Tensor:
    """The negative prototypes that `proto_nce` contrasts with when given the same seed.

    Args:
        num_prototypes: K.
        num_negatives: r; None, or more than exist: all.
        positives: int64 [N], the rows' own prototypes, in [0, K).
        seed: int, or 0-d int64 tensor.

    Returns:
        int64 [r']: distinct, uniform over the prototypes that are not in `positives`, in random order. r' = r, or fewer
        if there are no more.

    Raises:
        ValueError: K < 1 or r < 1.
    """
    if num_prototypes < 1:
        raise ValueError(f"num_prototypes must be positive, got {num_prototypes}")
    if num_negatives is not None and num_negatives < 1:
        raise ValueError(f"num_negatives must be positive, or None for all, got {num_negatives}")
    return reference.candidate_negatives(num_prototypes, num_negatives, positives, int(seed))


def protonce(
    query: torch.Tensor,
    key: torch.Tensor,
    queue: torch.Tensor,
    prototypes: Sequence[PrototypeSet],
    index: torch.Tensor,
    *,
    temperature: float,
    num_negatives: int | None,
    seed: int | torch.Tensor,
    backend: str = "auto",
) -> ProtoNCEResult:
    """The whole loss of PCL: mean_i InfoNCE_i + (1/M) sum_m mean_i ProtoNCE_im.

    Args: see `info_nce` and `proto_nce`. `prototypes` may be empty (warm-up, MoCo): InfoNCE alone. Granularity m draws
    its negatives with seed + m.

    Raises:
        ValueError: see `info_nce` and `proto_nce`.
    """
    instance = info_nce(query, key, queue, temperature, backend=backend)
    parts = [
        proto_nce(query, granularity, index, num_negatives, seed=seed + m, backend=backend)
        for m, granularity in enumerate(prototypes)
    ]
    loss = instance.loss.mean()
    if parts:
        loss = loss + torch.stack([part.loss.mean() for part in parts]).mean()
    return ProtoNCEResult(loss, instance, parts)


def _full_precision(query: torch.Tensor) -> torch.autocast:
    """Autocast would round the products to half precision."""
    return torch.autocast(query.device.type, enabled=False)


def _check_backend(backend: str) -> None:
    if backend == "triton":
        raise ValueError('backend "triton" is not part of this version; use "torch" or "auto"')
    if backend not in ("auto", "torch"):
        raise ValueError(f'the loss has the backends "auto" and "torch", not {backend!r}')


def _check_rows(name: str, rows: torch.Tensor) -> None:
    if rows.ndim != 2 or not rows.is_floating_point() or not len(rows):
        raise ValueError(f"{name} must be [N, d] floating point with N >= 1, got {list(rows.shape)} {rows.dtype}")


def _check_like(name: str, rows: torch.Tensor, query: torch.Tensor, length: int | None = None) -> None:
    """rows: [length, d] (any length if None) floating point beside the query."""
    wanted = f"[{'R' if length is None else length}, {query.shape[1]}]"
    fits = rows.ndim == 2 and rows.shape[1] == query.shape[1] and length in (None, len(rows))
    if not fits or not rows.is_floating_point():
        raise ValueError(
            f"{name} must be {wanted} floating point to go with query {list(query.shape)}, "
            f"got {list(rows.shape)} {rows.dtype}"
        )
    _check_device(name, rows, query)


def _check_prototypes(prototypes: PrototypeSet, query: torch.Tensor) -> None:
    centroids, concentration, assignment = prototypes
    _check_like("prototypes.centroids", centroids, query)
    if concentration.shape != centroids.shape[:1] or not len(centroids):
        raise ValueError(
            f"prototypes.concentration must be [K] with K >= 1 for centroids {list(centroids.shape)}, "
            f"got {list(concentration.shape)}"
        )
    if assignment.ndim != 1 or assignment.is_floating_point():
        raise ValueError(f"prototypes.assignment must be [n] integers, got {list(assignment.shape)} {assignment.dtype}")
    _check_device("prototypes.concentration", concentration, query)
    _check_device("prototypes.assignment", assignment, query)


def _check_index(index: torch.Tensor, query: torch.Tensor, images: int) -> None:
    if index.shape != query.shape[:1] or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [{len(query)}], got {index.dtype} {list(index.shape)}")
    _check_device("index", index, query)
    if index.device.type == "cpu" and not (int(index.min()) >= 0 and int(index.max()) < images):
        raise ValueError(
            f"index must lie in [0, {images}), the images that were clustered; "
            f"got {int(index.min())} to {int(index.max())}"
        )


def _check_device(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}, query on {query.device}; they must be on one device")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
