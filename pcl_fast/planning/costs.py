"""Ours: what every phase of a run takes. Each function states its formula."""

from __future__ import annotations

from typing import NamedTuple

from pcl_fast.planning.constants import Constant
from pcl_fast.planning.encoder import EncoderCount, Work, count
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
from pcl_fast.planning.machines import Machine, Precision
from pcl_fast.schedule import ENCODED_ON_GPU

BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends together
# Per parameter: SGD reads three float32 and writes two, the momentum encoder reads two and writes one.
UPDATE_BYTES = 4 * (5 + 3)

_LOSS_OVERHEAD = Constant(
    "loss by its reading the banks once",
    2.5,
    "",
    "assumed: bench/results/NOTES.md expects 8 to 11 us where reading takes 4",
)
DISK = Constant("writing a checkpoint", 1e9, "B/s", "assumed: a local SSD")


class StepTimes(NamedTuple):
    """Seconds of one step on one GPU that nothing hides, without waiting for data."""

    encoder: float
    loss: float
    optimiser: float
    exchange: float

    @property
    def total(self) -> float:
        return sum(self)


def plan(job: Job, machine: Machine) -> list[Phase]:
    """The phases of a run, in the order of job.PHASES."""
    encoder, encoder_constants = _encoder(job, machine)
    update = UPDATE_BYTES * _counted(job).parameters / machine.bandwidth.value
    exchange = _exchange(job, machine, encoder)
    steps = {True: job.prototype_steps, False: job.warmup_steps}
    times = {
        prototypes: StepTimes(encoder, _loss(job, machine, prototypes)[0], update, exchange) for prototypes in steps
    }
    data = job.batch / (job.nodes * job.cores * machine.decoded.value)

    def over_run(name: str) -> float:
        return sum(number * getattr(times[prototypes], name) for prototypes, number in steps.items())

    waiting = sum(number * max(0.0, data - times[prototypes].total) for prototypes, number in steps.items())
    return [
        Phase(ENCODER, over_run("encoder"), "steps x (1 + forward / training) x N / rate", encoder_constants),
        Phase(LOSS, over_run("loss"), *_loss(job, machine, True)[1:]),
        Phase(OPTIMISER, over_run("optimiser"), "steps x 32 B x parameters / bandwidth", (machine.bandwidth,)),
        Phase(
            EXCHANGE,
            over_run("exchange"),
            "steps x (gradients + shuffled bytes - what runs meanwhile)",
            (machine.gpu_link, *([machine.node_link] if job.nodes > 1 else [])) if job.world > 1 else (),
        ),
        Phase(DATA, waiting, "steps x max(0, batch / (cores x rate) - step)", (machine.decoded,)),
        _features(job, machine),
        _clustering(job, machine),
        _rest(job, machine),
    ]


def _counted(job: Job) -> EncoderCount:
    return count(job.config.model, job.config.data.size)


def relative(job: Job, precision: Precision, bandwidth: float, pass_name: str) -> float:
    """How much longer an image takes than in ResNet-50 at 224 px, whose rates are known.

    By (FLOP / peak + bytes / bandwidth): the same share of it is reached, whatever the encoder.
    """

    def bound(work: Work) -> float:
        return work.seconds(precision.peak.value, bandwidth, precision.itemsize)

    known = count(type(job.config.model)(), 224)
    return bound(getattr(_counted(job), pass_name)) / bound(getattr(known, pass_name))


def supervised_seconds(job: Job, precision: Precision, bandwidth: float) -> tuple[float, tuple[Constant, ...]]:
    """N / (rate on so many GPUs * rate with batch N by that with the published batch) * relative encoder."""
    rate = precision.training.per_gpu(job.gpus)
    share = precision.inference.share(job.rows, precision.training.batch)
    seconds = job.rows / (rate.value * share.value) * relative(job, precision, bandwidth, "training")
    return seconds, (rate, share) if share.value != 1 else (rate,)


def _encoder(job: Job, machine: Machine) -> tuple[float, tuple[Constant, ...]]:
    """Query forward and backward, key forward: as measured, or the supervised step's seconds * counted FLOP ratio."""
    if machine.measured_step is None:
        seconds, constants = supervised_seconds(job, machine.half, machine.bandwidth.value)
        return seconds * _counted(job).step, constants
    step, batch = machine.measured_step
    training = machine.half.training
    together, alone = training.per_gpu(job.gpus), training.per_gpu(1)
    share = machine.half.inference.share(job.rows, batch)
    rate = step.value * together.value / alone.value * share.value
    factor = relative(job, machine.half, machine.bandwidth.value, "training")
    constants = [step, *([together] if job.gpus > 1 else []), *([share] if share.value != 1 else [])]
    return job.rows / rate * factor, tuple(constants)


def _loss(job: Job, machine: Machine, prototypes: bool) -> tuple[float, str, tuple[Constant, ...]]:
    """(seconds, formula, constants): half-precision banks read once, times what the kernels are expected to take by
    that; or as measured, by the columns.
    """
    columns = job.columns(prototypes)
    if machine.measured_loss is not None:
        measured, of = machine.measured_loss
        seconds = measured.value * columns / of * max(1.0, job.rows / 64)
        return seconds, "steps x measured x columns / its columns x max(1, N / 64)", (measured,)
    seconds = _LOSS_OVERHEAD.value * 2 * columns * job.config.model.dim / machine.bandwidth.value
    return seconds, "steps x overhead x 2 B x d x columns / bandwidth", (_LOSS_OVERHEAD, machine.bandwidth)


def _exchange(job: Job, machine: Machine, encoder: float) -> float:
    """What of the gradients' all-reduce does not fit beside the backward pass (of which the last bucket never does),
    and of the shuffled batch's way to other GPUs beside the query's forward pass.
    """
    if job.world == 1:
        return 0.0
    links = machine.gpu_link.value, machine.node_link.value
    work = _counted(job)
    forward = encoder * work.forward.flop / (work.training.flop + work.forward.flop)
    backward = encoder - 2 * forward
    size = 4 * work.parameters
    gradients = max(reduce_seconds(min(size, BUCKET), job, *links), reduce_seconds(size, job, *links) - backward)
    sent = job.rows * job.view_bytes
    shuffle = max(
        (job.world - 1) / job.world * sent / links[0], (job.nodes - 1) / job.nodes * job.gpus * sent / links[1]
    )
    return gradients + (max(0.0, shuffle - forward) if job.config.model.shuffle_bn else 0.0)


def feature_passes(job: Job) -> tuple[int, int]:
    """(passes, clusterings): a clustering before every epoch after warm-up and after the last epoch; a pass before each
    of these, and for evaluation before every n-th epoch and after the last.
    """
    return len(job.clustered | job.evaluated), len(job.clustered)


def _features(job: Job, machine: Machine) -> Phase:
    """Passes * images * max(forward pass over all GPUs, loading); with a cache all but the first read instead."""
    passes, _ = feature_passes(job)
    rate = machine.half.inference.rate(ENCODED_ON_GPU)
    forward = relative(job, machine.half, machine.bandwidth.value, "forward") / (rate.value * job.world)
    loading = 1 / (job.nodes * job.cores * machine.decoded.value)
    if machine.cache is not None and passes:
        reading = job.view_bytes / (job.nodes * machine.cache.value)
        return Phase(
            FEATURES,
            job.images * (max(forward, loading) + (passes - 1) * max(forward, reading)),
            f"images x max(1 / (GPUs x rate), 1 / (cores x rate)) + {passes - 1} x images x max(1 / (GPUs x rate), "
            f"view / (machines x cache)), here {'cache' if reading > forward else 'GPUs'}",
            (rate, machine.decoded, machine.cache),
        )
    return Phase(
        FEATURES,
        passes * job.images * max(forward, loading),
        f"{passes} x images x max(1 / (GPUs x rate), 1 / (cores x rate)), "
        f"here {'cores' if loading > forward else 'GPUs'}",
        (rate, machine.decoded),
    )


def _clustering(job: Job, machine: Machine) -> Phase:
    """Clusterings * (products / rate of all GPUs), or the centroids' all-reduce where that is longer."""
    _, clusterings = feature_passes(job)
    if not clusterings:
        return Phase(CLUSTERING, 0.0, "none")
    options = job.config.cluster
    search = job.search_flop(options.iterations, options.redo) / (machine.clustering.value * job.world)
    sums = 4 * (job.config.model.dim + 1) * sum(job.ks) * options.iterations * options.redo
    exchange = reduce_seconds(sums, job, machine.gpu_link.value, machine.node_link.value)
    return Phase(
        CLUSTERING,
        clusterings * max(search, exchange),
        f"{clusterings} x 2 n d sum(K) x ({options.iterations} x {options.redo} + 1) / (GPUs x rate)",
        (machine.clustering,),
    )


def _rest(job: Job, machine: Machine) -> Phase:
    """Evaluations * similarities of the queries, written and read twice + epochs * checkpoint."""
    config = job.config
    neighbours = 6 * config.evaluation.queries * job.images / (machine.bandwidth.value * job.world)
    parameters = _counted(job).parameters
    held = 3 * parameters + config.model.dim * (sum(job.ks) + config.model.queue_size) + len(job.ks) * job.images
    seconds = len(job.evaluated) * neighbours + config.epochs * 4 * held / DISK.value
    formula = f"{len(job.evaluated)} x 6 B x queries x images / bandwidth + epochs x checkpoint / disk"
    return Phase(REST, seconds, formula, (machine.bandwidth, DISK))
