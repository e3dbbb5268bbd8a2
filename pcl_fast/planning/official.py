"""The official way (salesforce/PCL; without prototypes facebookresearch/moco), on the same machine.

float32, channels first; images by PIL in 32 worker processes in all; every step waits for the loss, so that what the
host does is added; float images of all GPUs to all for shuffled batch norm; features in float32; k-means by faiss on
one GPU, while the others wait; the concentration by loops in Python.
"""

from __future__ import annotations

from pcl_fast.planning.figures import Constant
from pcl_fast.planning.job import PHASES, Job, Phase, over_run
from pcl_fast.planning.ours import DISK, gradients_seconds, links, reduce_seconds, relative, supervised
from pcl_fast.planning.rates import Machine

_WORKERS = 32  # --workers of both codes, divided among the GPUs of a machine
_FEATURE_BATCHES = 5  # times the batch
_CHECKPOINT_EVERY = 5
_ITERATIONS, _REDO = 20, 5  # fixed there
# SGD reads and writes five float32 per parameter in separate passes (weight decay, momentum, step: 3 + 3 + 3), the
# momentum encoder eight (two products, a sum, a copy).
_UPDATE_BYTES = 4 * (9 + 8)
# 256 TFLOP (1M x 256 into 20,000, 25 iterations) in 55 s on a P100 of 10.6 TFLOP/s.
_FAISS_SHARE = 256 / 55 / 10.6
_RECORDED_KS, _RECORDED_IMAGES = 25_000 + 50_000 + 100_000, 1_281_167  # of Machine.sampling, loops and official_estep


def plan(job: Job, machine: Machine) -> dict[str, Phase]:
    """The phases of a run by their names in job.PHASES, in that order."""
    seconds, constants = supervised(job, machine, machine.single)
    count = job.encoder
    encoder = Phase(seconds * count.step, "steps x (1 + forward / training) x N / rate, float32", constants)
    update = _UPDATE_BYTES * count.parameters / machine.bandwidth.value
    optimiser = Phase(update, "steps x 68 B x parameters / bandwidth", (machine.bandwidth,))
    exchange = _exchange(job, machine, seconds * (1 - count.forward.flop / count.training.flop))
    loading = job.batch / (_workers(job) * machine.pair.value)
    data = Phase(loading, f"steps x max(0, batch / (min({_WORKERS}, cores) x rate) - step)", (machine.pair,))
    steps = over_run(job, lambda prototypes: [encoder, _loss(job, machine, prototypes), optimiser, exchange], data)
    saving = job.config.epochs // _CHECKPOINT_EVERY * 4 * 3 * count.parameters / DISK.value
    rest = Phase(saving, f"saving every {_CHECKPOINT_EVERY} epochs", (DISK,))
    return dict(zip(PHASES, (*steps, _features(job, machine), _clustering(job, machine), rest), strict=True))


def _workers(job: Job) -> int:
    return job.nodes * min(_WORKERS, job.cores)


def _loss(job: Job, machine: Machine, prototypes: bool) -> Phase:
    """Logits in float32, written and read forward and backward; sets and lists of the prototypes' ids on the host."""
    logits = 4 * 4 * job.rows * job.columns(prototypes) / machine.bandwidth.value
    ids = prototypes * machine.sampling.value * sum(job.ks) / _RECORDED_KS
    constants = (machine.sampling, machine.bandwidth) if job.ks else (machine.bandwidth,)
    return Phase(logits + ids, "steps x (16 B x N x columns / bandwidth + negatives on the host)", constants)


def _exchange(job: Job, machine: Machine, backward: float) -> Phase:
    """Every GPU receives the float images of all others before the key's forward pass; then gradients as in ours."""
    image = 4 * job.view_bytes * job.rows
    within = (job.world - 1) * image / machine.gpu_link.value
    images = max(within, (job.nodes - 1) * job.gpus * image / machine.node_link.value)
    seconds = images + gradients_seconds(job, machine, backward) if job.world > 1 else 0.0
    return Phase(seconds, "steps x (float images of all to all + gradients not hidden)", links(job, machine))


def _features(job: Job, machine: Machine) -> Phase:
    """Passes * (images * max(forward pass, loading) + the features' all-reduce and copy to the host)."""
    passes = job.prototype_epochs
    if not passes:
        return Phase(0.0, "none")
    rate = machine.single.forward(_FEATURE_BATCHES * job.rows)
    forward = relative(job, machine, machine.single, "forward") / (rate.value * job.world)
    loading = 1 / (_workers(job) * machine.view.value)
    moved = reduce_seconds(job.feature_bytes, job, machine) + job.feature_bytes / machine.host_link.value
    formula = f"{passes} x (images x max(1 / (GPUs x rate), 1 / (workers x rate)) + copies), here "
    formula += "workers" if loading > forward else "GPUs"
    return Phase(passes * (job.images * max(forward, loading) + moved), formula, (rate, machine.view))


def _clustering(job: Job, machine: Machine) -> Phase:
    """E-steps * (products / rate of one GPU + features to the GPU in every iteration + loops in Python); or as
    estimated from measured parts for the paper's E-step, by its products.
    """
    esteps, flop = job.prototype_epochs, job.search_flop(_ITERATIONS * _REDO + 1)
    if not esteps:
        return Phase(0.0, "none")
    if machine.official_estep is not None:
        whole = 2.0 * _RECORDED_IMAGES * 128 * _RECORDED_KS * (_ITERATIONS * _REDO + 1)
        seconds = machine.official_estep.value * flop / whole
        return Phase(esteps * seconds, f"{esteps} x measured x products / its products", (machine.official_estep,))
    rate = Constant(
        "faiss k-means, one GPU",
        _FAISS_SHARE * machine.vector_peak.value,
        "FLOP/s",
        "assumed: the share of true float32 that a P100 reached (published: faiss wiki, Low-level benchmarks)",
    )
    copies = (_ITERATIONS * _REDO + 1) * len(job.ks) * job.feature_bytes / machine.host_link.value
    loops = len(job.ks) * machine.loops.value * job.images / _RECORDED_IMAGES
    formula = f"{esteps} x (2 n d sum(K) x ({_ITERATIONS} x {_REDO} + 1) / rate of one GPU + copies + loops)"
    return Phase(esteps * (flop / rate.value + copies + loops), formula, (rate, machine.host_link, machine.loops))
