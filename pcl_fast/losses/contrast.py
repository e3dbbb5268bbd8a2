"""InfoNCE and ProtoNCE (equations 1 and 11 of the paper).

Keys, queue and prototypes are constants: the only gradient is with respect to the query.

All losses have an argument `backend`: "triton" means the fused kernels; "torch", plain PyTorch operations; "auto",
triton for CUDA tensors of the types that it takes, torch elsewhere (and for float32 keys, queue or prototypes on Volta,
where nobody has measured which is faster). Both draw the same negatives and, up to rounding,
return the same. The kernels take float32, float16 and bfloat16, d up to 512 (on Volta up to 128, and no bfloat16), and
entries of float32 features below 64 in absolute value.

Shapes, types and devices are always checked. Values are checked on the CPU, where this costs nothing; on a GPU the host
would have to wait, so there they are only checked if PCL_FAST_DEBUG=1 is set in the environment.

The names of the losses: `info_nce` is equation 1, `proto_nce` one granularity of equation 11, and `pcl_loss` the whole
loss, which the paper calls ProtoNCE; so `protonce` is another name for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

from pcl_fast.clustering.types import PrototypeSet
from pcl_fast.kernels import contrast_plain, sampling_plain, switches

# Triton does not exist for macOS.
fused_kernels = import_module("pcl_fast.kernels.contrast") if find_spec("triton") else None


class ContrastResult(NamedTuple):
    """A contrast's result, row by row.

    loss: [N] float32 (float64 for a float64 query).
    correct: [N] bool, whether the positive scored strictly above every negative.
    """

    loss: torch.Tensor
    correct: torch.Tensor


class ProtoNCEResult(NamedTuple):
    """The whole loss, and the parts that it is made of.

    loss: scalar, mean InfoNCE + mean over the granularities of mean ProtoNCE.
    instance: InfoNCE, row by row.
    prototype: ProtoNCE of every granularity, row by row.
    """

    loss: torch.Tensor
    instance: ContrastResult
    prototype: list[ContrastResult]


def info_nce(
    query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, temperature: float, *, backend: str = "auto"
) -> ContrastResult:
    """Return InfoNCE (equation 1): loss_i = -log( exp(q_i.k_i/tau) / (exp(q_i.k_i/tau) + sum_j exp(q_i.queue_j/tau)) ).

    Args:
        query: [N, d] unit features, any floating dtype; sums are taken in float32. The kernels round a float32 query
            to the precision of what it is contrasted with; its gradient is float32 all the same.
        key: [N, d] momentum features of the other view of each image.
        queue: [R, d] keys of earlier batches.
        temperature: tau > 0.
        backend: see the module's docstring.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty queue, temperature <= 0, or a backend that is
            unknown or cannot be used here.
    """
    _check_instance(query, key, queue, temperature)
    fused = _fused(backend, query, key, queue)
    if fused:
        _, loss, correct = fused.contrast(query, key, queue, temperature, [], None, None, 0)
        return ContrastResult(loss[0], correct[0])
    with _full_precision(query):
        return ContrastResult(*contrast_plain.contrast(query, key, 1 / temperature, queue, 1 / temperature))


def proto_nce(
    query: torch.Tensor,
    prototypes: PrototypeSet,
    index: torch.Tensor,
    num_negatives: int | None,
    *,
    seed: int | torch.Tensor,
    backend: str = "auto",
    batch: torch.Tensor | None = None,
) -> ContrastResult:
    """Return ProtoNCE of one granularity (equation 11): each query q contrasts its own prototype with others, and the
    score of a prototype c is q.c/phi_c.

    The negatives of row i are the r prototypes of `sample_negatives` and the prototypes of the batch's other rows, one
    column per row. A twin of row i (another row that has the same prototype) adds none.

    Args:
        query: [N, d] unit features, any floating dtype; sums are taken in float32. The kernels round a float32 query
            to the precision of what it is contrasted with; its gradient is float32 all the same.
        prototypes: centroids [K, d], concentration [K], assignment [n].
        index: int64 [N], positions of the rows' images in the data set, in [0, n).
        num_negatives: r. If it is None, or more than exist, all are taken.
        seed: decides the draw; an int, or a 0-d int64 tensor on the query's device, which is read there, so that a CUDA
            graph draws afresh at every replay for which the tensor has changed.
        backend: see the module's docstring.
        batch: int64 [B], positions of the images of a larger batch, of which the rows are a part: its prototypes are
            the columns and are not drawn, so that parts of it have the losses that the whole has. None: the rows are
            all.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no prototypes, r < 1, a backend that is unknown or cannot
            be used here, or (where values are checked) an index out of range or a concentration <= 0.
    """
    _check_rows("query", query)
    _check_draw(num_negatives, seed, query.device)
    _check_prototypes(prototypes, index, query, batch)
    fused = _fused(backend, query, prototypes.centroids)
    if fused:
        _, loss, correct = fused.contrast(query, None, None, 1.0, [prototypes], index, num_negatives, seed, batch)
        return ContrastResult(loss[0], correct[0])
    positives = prototypes.assignment[index].long()
    of_batch = positives if batch is None else prototypes.assignment[batch].long()
    negatives, there = sampling_plain.negative_columns(len(prototypes.centroids), num_negatives, of_batch, seed)
    columns = torch.cat([of_batch, negatives])
    weight = 1 / prototypes.concentration
    # Hidden from a row are its own column and those of its twins. The sampled prototypes are nobody's own.
    hidden = positives[:, None] == of_batch
    with _full_precision(query):
        return ContrastResult(
            *contrast_plain.contrast(
                query,
                prototypes.centroids.index_select(0, positives),
                weight[positives],
                prototypes.centroids.index_select(0, columns),  # a quarter of the time of [columns] on a CPU
                weight[columns],
                hidden,
                there,
            )
        )


def sample_negatives(
    num_prototypes: int, num_negatives: int | None, positives: torch.Tensor, *, seed: int | torch.Tensor
) -> torch.Tensor:
    """Return the negative prototypes that `proto_nce` draws with the same seed.

    If r may be more than exist, this waits for the GPU to count them; the losses themselves never wait.

    Args:
        num_prototypes: K.
        num_negatives: r. If it is None, or more than exist, all are taken.
        positives: int64 [N], the rows' own prototypes, in [0, K).
        seed: int, or 0-d int64 tensor on the device of `positives`.

    Returns:
        int64 [r'], distinct ids, drawn uniformly from the prototypes that are not in `positives`, in random order; r'
        is r, or less if no more exist.

    Raises:
        ValueError: K < 1, r < 1, or a seed beyond 64 bits or on another device.
    """
    if num_prototypes < 1:
        raise ValueError(f"num_prototypes must be positive, got {num_prototypes}")
    _check_draw(num_negatives, seed, positives.device)
    ids, there = sampling_plain.negative_columns(num_prototypes, num_negatives, positives, seed)
    return ids if there is None else ids[there]


def pcl_loss(
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
    batch: torch.Tensor | None = None,
) -> ProtoNCEResult:
    """Return the whole loss of PCL: mean_i InfoNCE_i + (1/M) sum_m mean_i ProtoNCE_im.

    Args:
        query, key, queue, temperature: see `info_nce`.
        prototypes: the M granularities; with none (during warm-up, or for MoCo) the loss is InfoNCE alone.
        index, num_negatives, seed, batch: see `proto_nce`; granularity m draws its negatives with seed + m.
        backend: see the module's docstring.

    Raises:
        ValueError: see `info_nce` and `proto_nce`.
    """
    _check_rows("query", query)
    fused = _fused(backend, query, key, queue, *(granularity.centroids for granularity in prototypes))
    if fused:
        _check_instance(query, key, queue, temperature)
        _check_draw(num_negatives, seed, query.device)
        for granularity in prototypes:
            _check_prototypes(granularity, index, query, batch)
        mean, loss, correct = fused.contrast(
            query, key, queue, temperature, prototypes, index, num_negatives, seed, batch
        )
        results = [ContrastResult(*rows) for rows in zip(loss.unbind(), correct.unbind(), strict=True)]
        return ProtoNCEResult(mean, results[0], results[1:])
    instance = info_nce(query, key, queue, temperature, backend=backend)
    parts = [
        proto_nce(query, granularity, index, num_negatives, seed=seed + m, backend=backend, batch=batch)
        for m, granularity in enumerate(prototypes)
    ]
    loss = instance.loss.mean()
    if parts:
        loss = loss + torch.stack([part.loss.mean() for part in parts]).mean()
    return ProtoNCEResult(loss, instance, parts)


# The paper's name for the whole loss. The code says pcl_loss, which nobody mistakes for one granularity's `proto_nce`.
protonce = pcl_loss


def _full_precision(query: torch.Tensor) -> torch.autocast:
    """Return a context without autocast, which would round the products to half precision."""
    return torch.autocast(query.device.type, enabled=False)


def takes_kernels(backend: str, query: torch.Tensor, *banks: torch.Tensor) -> bool:
    """Return whether a loss of such tensors is computed by the fused kernels.

    Raises:
        ValueError: see `_fused`.
    """
    return _fused(backend, query, *banks) is not None


def _fused(backend: str, query: torch.Tensor, *banks: torch.Tensor) -> ModuleType | None:
    """Return the module of the fused kernels, or None if plain PyTorch is to be used.

    Raises:
        ValueError: an unknown backend, or the fused kernels are asked for and cannot be used; says why.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'the loss has the backends "auto", "triton" and "torch", not {backend!r}')
    if backend == "torch" or (backend == "auto" and not query.is_cuda):
        return None
    obstacle = _obstacle(query, banks)
    if backend == "auto":
        fast = obstacle is None and all(fused_kernels.pays(bank.dtype, query.device) for bank in banks)
        return fused_kernels if fast else None
    if obstacle is None:
        return fused_kernels
    raise ValueError(f'backend "triton" {obstacle}; use backend "torch"')


def _obstacle(query: torch.Tensor, banks: Sequence[torch.Tensor]) -> str | None:
    """Return why the fused kernels cannot be used, or None if they can."""
    if fused_kernels is None:
        return "needs the package triton, which is not installed"
    if switches.is_off("contrast"):
        return "is switched off, because its kernels were found wrong on this run's GPUs"
    if not query.is_cuda and not fused_kernels.INTERPRETED:
        return (
            f"needs CUDA tensors, query is on {query.device} (to debug the kernels without a GPU, set "
            "TRITON_INTERPRET=1 before Python starts)"
        )
    other = [str(rows.dtype) for rows in (query, *banks) if not fused_kernels.takes(rows.dtype, query.device)]
    if other:
        return f"takes float32, float16 and, from compute capability 8.0 on, bfloat16, got {other[0]}"
    widest = fused_kernels.widest(query.device)
    if not widest:
        return f"needs a GPU of compute capability 8.0 or newer, or 7.0 and Triton 3.1, which {query.device} is not"
    return f"takes d up to {widest} on {query.device}, got {query.shape[1]}" if query.shape[1] > widest else None


def _check_instance(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, temperature: float) -> None:
    _check_rows("query", query)
    _check_like("key", key, query, len(query))
    _check_like("queue", queue, query)
    if not len(queue):
        raise ValueError("queue is empty, there is nothing to contrast with")
    _check_positive("temperature", temperature)


def _check_draw(num_negatives: int | None, seed: int | torch.Tensor, device: torch.device) -> None:
    if num_negatives is not None and num_negatives < 1:
        raise ValueError(f"num_negatives must be positive, or None for all, got {num_negatives}")
    if isinstance(seed, torch.Tensor):
        if seed.ndim or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"seed must be an int or a 0-d int64 tensor on {device}, got {seed.dtype} {list(seed.shape)} "
                f"on {seed.device}"
            )
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")


def _check_rows(name: str, rows: torch.Tensor) -> None:
    if rows.ndim != 2 or not rows.is_floating_point() or not len(rows):
        raise ValueError(f"{name} must be [N, d] floating point with N >= 1, got {list(rows.shape)} {rows.dtype}")


def _check_like(name: str, rows: torch.Tensor, query: torch.Tensor, length: int | None = None) -> None:
    """Refuse rows that are not [length, d] (any length if None), floating point, and on the query's device."""
    wanted = f"[{'R' if length is None else length}, {query.shape[1]}]"
    fits = rows.ndim == 2 and rows.shape[1] == query.shape[1] and length in (None, len(rows))
    if not fits or not rows.is_floating_point():
        raise ValueError(
            f"{name} must be {wanted} floating point to go with query {list(query.shape)}, "
            f"got {list(rows.shape)} {rows.dtype}"
        )
    _check_device(name, rows, query)


def _check_prototypes(
    prototypes: PrototypeSet, index: torch.Tensor, query: torch.Tensor, batch: torch.Tensor | None
) -> None:
    centroids, concentration, assignment = prototypes
    _check_like("prototypes.centroids", centroids, query)
    fits = concentration.shape == centroids.shape[:1] and concentration.is_floating_point()
    if not fits or not len(centroids):
        raise ValueError(
            f"prototypes.concentration must be [K] floating point with K >= 1 for centroids {list(centroids.shape)}, "
            f"got {list(concentration.shape)} {concentration.dtype}"
        )
    if assignment.ndim != 1 or assignment.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"prototypes.assignment must be [n] int32 or int64, got {list(assignment.shape)} {assignment.dtype}"
        )
    if index.shape != query.shape[:1] or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [{len(query)}], got {index.dtype} {list(index.shape)}")
    _check_device("prototypes.concentration", concentration, query)
    _check_device("prototypes.assignment", assignment, query)
    _check_device("index", index, query)
    if batch is not None:
        if batch.ndim != 1 or len(batch) < len(index) or batch.dtype != torch.int64:
            raise ValueError(
                f"batch must be int64 [B] with B >= {len(index)}, the rows among them, got {batch.dtype} "
                f"{list(batch.shape)}"
            )
        _check_device("batch", batch, query)
    if not torch.compiler.is_compiling() and (not query.is_cuda or os.environ.get("PCL_FAST_DEBUG") == "1"):
        _check_values(prototypes, index if batch is None else batch)


def _check_values(prototypes: PrototypeSet, index: torch.Tensor) -> None:
    centroids, concentration, assignment = prototypes
    _check_range("index", index, len(assignment), "the images that were clustered")
    _check_range("prototypes.assignment of the batch", assignment[index], len(centroids), "the prototypes")
    if not float(concentration.min()) > 0:
        raise ValueError(f"prototypes.concentration must be positive, got {float(concentration.min())}")


def _check_range(name: str, values: torch.Tensor, end: int, what: str) -> None:
    least, most = (int(value) for value in values.aminmax())
    if least < 0 or most >= end:
        raise ValueError(f"{name} must lie in [0, {end}), {what}; got {least} to {most}")


def _check_device(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device}, query on {query.device}; they must be on one device")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
