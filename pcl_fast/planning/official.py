"""The official way (salesforce/PCL; without prototypes facebookresearch/moco), on the same machine.

float32, channels first; images by PIL in 32 worker processes in all; every step waits for the loss, so that what the
host does is added; float images of all GPUs to all for shuffled batch norm; features in float32; k-means by faiss on
one GPU, while the others wait; the concentration by loops in Python.
"""

from __future__ import annotations

from pcl_fast.planning.constants import Constant
from pcl_fast.planning.costs import BUCKET, DISK, relative, supervised_seconds
from pcl_fast.planning.encoder import count
from pcl_fast.planning.job import (
    CLUSTERING,
    DATA,
    ENCODER,
    EXCHANGE,
    FEATURES,
    LOSS,
    OPTIMISER,
    REST,
    Job,
    Phase,
    reduce_seconds,
)
from pcl_fast.planning.machines import Machine
from pcl_fast.planning.records import Records

WORKERS = 32  # --workers of both codes, divided among the GPUs of a machine
_FEATURE_BATCHES = 5  # times the batch
_CHECKPOINT_EVERY = 5
_ITERATIONS, _REDO = 20, 5  # fixed there
# SGD reads and writes five float32 per parameter in separate passes (weight decay, momentum, step: 3 + 3 + 3), the
# momentum encoder eight (two products, a sum, a copy).
_UPDATE_BYTES = 4 * (9 + 8)

# 256 TFLOP (1M x 256 into 20,000, 25 iterations) in 55 s on a P100 of 10.6 TFLOP/s.
_FAISS_SHARE = 256 / 55 / 10.6

_SAMPLED_KS, _CONCENTRATION_IMAGES = 25_000 + 50_000 + 100_000, 1_281_167  # of the records


def plan(job: Job, machine: Machine, records: Records, gpu: str) -> list[Phase]:
    """The phases of a run, in the order of job.PHASES.

    Raises:
        ValueError: no record says what the host's part takes.
    """
    supervised, encoder_constants = supervised_seconds(job, machine.single, machine.bandwidth.value)
    counted = count(job.config.model, job.config.data.size)
    encoder = supervised * counted.step
    update = _UPDATE_BYTES * counted.parameters / machine.bandwidth.value
    exchange = _exchange(job, machine, supervised * (1 - counted.forward.flop / counted.training.flop))
    losses = {prototypes: _loss(job, machine, records, gpu, prototypes) for prototypes in (False, True)}
    steps = {True: job.prototype_steps, False: job.warmup_steps}
    workers = job.nodes * min(WORKERS, job.cores)
    data = job.batch / (workers * machine.host.pair.value)
    waiting = sum(
        number * max(0.0, data - (encoder + update + exchange + losses[prototypes][0]))
        for prototypes, number in steps.items()
    )
    everything = sum(steps.values())
    return [
        Phase(ENCODER, everything * encoder, "steps x (1 + forward / training) x N / rate, float32", encoder_constants),
        Phase(
            LOSS,
            sum(number * losses[prototypes][0] for prototypes, number in steps.items()),
            "steps x (16 B x N x columns / bandwidth + negatives on the host)",
            losses[bool(job.ks)][1],
        ),
        Phase(OPTIMISER, everything * update, "steps x 68 B x parameters / bandwidth", (machine.bandwidth,)),
        Phase(
            EXCHANGE,
            everything * exchange,
            "steps x (float images of all to all + gradients not hidden)",
            (machine.gpu_link, *([machine.node_link] if job.nodes > 1 else [])) if job.world > 1 else (),
        ),
        Phase(DATA, waiting, f"steps x max(0, batch / (min({WORKERS}, cores) x rate) - step)", (machine.host.pair,)),
        _features(job, machine),
        _clustering(job, machine, records, gpu),
        Phase(
            REST,
            job.config.epochs // _CHECKPOINT_EVERY * 4 * 3 * counted.parameters / DISK.value,
            f"saving every {_CHECKPOINT_EVERY} epochs",
            (DISK,),
        ),
    ]


def _loss(
    job: Job, machine: Machine, records: Records, gpu: str, prototypes: bool
) -> tuple[float, tuple[Constant, ...]]:
    """Logits in float32, written and read forward and backward; sets and lists of the prototypes' ids on the host."""
    logits = 4 * 4 * job.rows * job.columns(prototypes) / machine.bandwidth.value
    if not prototypes:
        return logits, (machine.bandwidth,)
    record, milliseconds = records.find("loss", "sampling alone", "official", "median_ms", first=gpu)
    sampling = record.constant("choosing negatives of 25k, 50k and 100k, official", milliseconds / 1e3, "s")
    return logits + sampling.value * sum(job.ks) / _SAMPLED_KS, (sampling, machine.bandwidth)


def _exchange(job: Job, machine: Machine, backward: float) -> float:
    """Every GPU receives the float images of all others before the key's forward pass; then gradients as in ours."""
    links = machine.gpu_link.value, machine.node_link.value
    image = 4 * job.view_bytes * job.rows
    within = (job.world - 1) * image / links[0]
    images = max(within, (job.nodes - 1) * job.gpus * image / links[1])
    size = 4 * count(job.config.model, job.config.data.size).parameters
    gradients = max(reduce_seconds(min(size, BUCKET), job, *links), reduce_seconds(size, job, *links) - backward)
    return images + gradients if job.world > 1 else 0.0


def _features(job: Job, machine: Machine) -> Phase:
    """Passes * (images * max(forward pass, loading) + the features' all-reduce and copy to the host)."""
    passes = job.prototype_epochs
    if not passes:
        return Phase(FEATURES, 0.0, "none")
    rate = machine.single.inference.rate(_FEATURE_BATCHES * job.rows)
    forward = relative(job, machine.single, machine.bandwidth.value, "forward") / (rate.value * job.world)
    loading = 1 / (job.nodes * min(WORKERS, job.cores) * machine.host.view.value)
    moved = reduce_seconds(job.feature_bytes, job, machine.gpu_link.value, machine.node_link.value)
    moved += job.feature_bytes / machine.host_link.value
    return Phase(
        FEATURES,
        passes * (job.images * max(forward, loading) + moved),
        f"{passes} x (images x max(1 / (GPUs x rate), 1 / (workers x rate)) + copies), "
        f"here {'workers' if loading > forward else 'GPUs'}",
        (rate, machine.host.view),
    )


def _clustering(job: Job, machine: Machine, records: Records, gpu: str) -> Phase:
    """E-steps * (products / rate of one GPU + features to the GPU in every iteration + loops in Python); or as
    estimated from measured parts for the paper's E-step, by its products.
    """
    esteps = job.prototype_epochs
    if not esteps:
        return Phase(CLUSTERING, 0.0, "none")
    flop = job.search_flop(_ITERATIONS, _REDO)
    if machine.measured_official_estep is not None:
        whole = 2.0 * _CONCENTRATION_IMAGES * 128 * _SAMPLED_KS * (_ITERATIONS * _REDO + 1)
        seconds = machine.measured_official_estep.value * flop / whole
        return Phase(
            CLUSTERING,
            esteps * seconds,
            f"{esteps} x measured x products / its products",
            (machine.measured_official_estep,),
        )
    rate = Constant(
        "faiss k-means, one GPU",
        _FAISS_SHARE * machine.vector_peak.value,
        "FLOP/s",
        "assumed: the share of true float32 that a P100 reached (published: faiss wiki, Low-level benchmarks)",
    )
    copies = (_ITERATIONS * _REDO + 1) * len(job.ks) * job.feature_bytes / machine.host_link.value
    group = f"concentration, N={_CONCENTRATION_IMAGES}, K=25000"
    record, milliseconds = records.find("kmeans", group, "official", "median_ms", first=gpu)
    loops = record.constant("concentration of 1,281,167 images, official", milliseconds / 1e3, "s")
    seconds = flop / rate.value + copies + len(job.ks) * loops.value * job.images / _CONCENTRATION_IMAGES
    return Phase(
        CLUSTERING,
        esteps * seconds,
        f"{esteps} x (2 n d sum(K) x ({_ITERATIONS} x {_REDO} + 1) / rate of one GPU + copies + loops)",
        (rate, machine.host_link, loops),
    )
