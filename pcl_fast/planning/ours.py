"""Ours: what every phase of a run takes. Each function states its formula."""

from __future__ import annotations

from pcl_fast.config import ModelConfig
from pcl_fast.planning.encoder import Work, count
from pcl_fast.planning.figures import Constant
from pcl_fast.planning.job import PHASES, Job, Phase, over_run
from pcl_fast.planning.rates import Machine, Precision
from pcl_fast.schedule import ENCODED_ON_GPU

# Per parameter: SGD reads three float32 and writes two, the momentum encoder reads two and writes one.
UPDATE_BYTES = 4 * (5 + 3)
DISK = Constant("writing a checkpoint", 1e9, "B/s", "assumed: a local SSD")
_BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends together
_LOSS_OVERHEAD = Constant(
    "loss by its reading the banks once",
    2.5,
    "",
    "assumed: bench/results/NOTES.md expects 8 to 11 us where reading takes 4",
)


def plan(job: Job, machine: Machine) -> dict[str, Phase]:
    """The phases of a run by their names in job.PHASES, in that order."""
    encoder = _encoder(job, machine)
    update = UPDATE_BYTES * job.encoder.parameters / machine.bandwidth.value
    optimiser = Phase(update, "steps x 32 B x parameters / bandwidth", (machine.bandwidth,))
    exchange = _exchange(job, machine, encoder.seconds)
    loading = job.batch / (job.nodes * job.cores * machine.decoded.value)
    data = Phase(loading, "steps x max(0, batch / (cores x rate) - step)", (machine.decoded,))
    steps = over_run(job, lambda prototypes: [encoder, _loss(job, machine, prototypes), optimiser, exchange], data)
    rest = (_features(job, machine), _clustering(job, machine), _rest(job, machine))
    return dict(zip(PHASES, (*steps, *rest), strict=True))


def relative(job: Job, machine: Machine, precision: Precision, pass_name: str) -> float:
    """How much longer an image takes than in ResNet-50 at 224 px, whose rates are known.

    By (FLOP / peak + bytes / bandwidth): the same share of it is reached, whatever the encoder.
    """

    def bound(work: Work) -> float:
        return work.flop / precision.peak + work.elements * precision.itemsize / machine.bandwidth.value

    return bound(getattr(job.encoder, pass_name)) / bound(getattr(count(ModelConfig(), 224), pass_name))


def supervised(job: Job, machine: Machine, precision: Precision) -> tuple[float, tuple[Constant, ...]]:
    """Seconds of a supervised step: N / (rate on so many GPUs * rate with batch N by that with the published batch) *
    relative encoder.
    """
    rate = precision.training(job.gpus)
    share = precision.share(job.rows, precision.batch)
    seconds = job.rows / (rate.value * share.value) * relative(job, machine, precision, "training")
    return seconds, (rate, share) if share.value != 1 else (rate,)


def _encoder(job: Job, machine: Machine) -> Phase:
    """Query forward and backward, key forward: as measured, or the supervised step's seconds * counted FLOP ratio."""
    formula = "steps x (1 + forward / training) x N / rate"
    if machine.step is None:
        seconds, constants = supervised(job, machine, machine.half)
        return Phase(seconds * job.encoder.step, formula, constants)
    step, batch = machine.step
    together, alone = (machine.half.training(gpus) for gpus in (job.gpus, 1))
    share = machine.half.share(job.rows, batch)
    rate = step.value * together.value / alone.value * share.value
    seconds = job.rows / rate * relative(job, machine, machine.half, "training")
    matters = {step: True, together: job.gpus > 1, share: share.value != 1}
    return Phase(seconds, formula, tuple(constant for constant, does in matters.items() if does))


def _loss(job: Job, machine: Machine, prototypes: bool) -> Phase:
    """Half-precision banks read once, times what the kernels are expected to take by that; or columns * measured *
    max(1, N / 64), as up to 64 rows share a pass over the banks.
    """
    columns = job.columns(prototypes)
    if machine.loss is not None:
        seconds = machine.loss.value * columns * max(1.0, job.rows / 64)
        return Phase(seconds, "steps x columns x measured x max(1, N / 64)", (machine.loss,))
    seconds = _LOSS_OVERHEAD.value * 2 * columns * job.config.model.dim / machine.bandwidth.value
    return Phase(seconds, "steps x overhead x 2 B x d x columns / bandwidth", (_LOSS_OVERHEAD, machine.bandwidth))


def reduce_seconds(size: float, job: Job, machine: Machine) -> float:
    """All-reduce of `size` bytes: a ring within every machine, then between machines.

    2 (g-1)/g size / gpu_link + 2 (m-1)/m size / node_link for g GPUs on each of m machines.
    """
    within = 2 * (job.gpus - 1) / job.gpus * size / machine.gpu_link.value
    return within + 2 * (job.nodes - 1) / job.nodes * size / machine.node_link.value


def gradients_seconds(job: Job, machine: Machine, backward: float) -> float:
    """What of the gradients' all-reduce does not fit beside the backward pass, which the last bucket never does."""
    size = 4 * job.encoder.parameters
    return max(reduce_seconds(min(size, _BUCKET), job, machine), reduce_seconds(size, job, machine) - backward)


def links(job: Job, machine: Machine) -> tuple[Constant, ...]:
    """The links that an exchange between all GPUs goes over."""
    if job.world == 1:
        return ()
    return (machine.gpu_link, machine.node_link) if job.nodes > 1 else (machine.gpu_link,)


def _exchange(job: Job, machine: Machine, encoder: float) -> Phase:
    """What does not fit beside the backward pass of the gradients' all-reduce, and beside the query's forward pass of
    the shuffled batch's way to other GPUs: of N views (G - 1) / G leave their GPU, and (M - 1) / M their machine.
    """
    forward = encoder * job.encoder.forward.flop / (job.encoder.training.flop + job.encoder.forward.flop)
    sent = job.rows * job.view_bytes * job.config.model.shuffle_bn
    within = (job.world - 1) / job.world * sent / machine.gpu_link.value
    between = (job.nodes - 1) / job.nodes * job.gpus * sent / machine.node_link.value
    seconds = gradients_seconds(job, machine, encoder - 2 * forward) + max(0.0, max(within, between) - forward)
    formula = "steps x (gradients + shuffled bytes - what runs meanwhile)"
    return Phase(seconds if job.world > 1 else 0.0, formula, links(job, machine))


def _features(job: Job, machine: Machine) -> Phase:
    """Passes * images * max(forward pass over all GPUs, loading); with a cache all but the first read instead.

    There is one pass before an epoch for its clustering and its evaluation together.
    """
    passes = len(job.clustered | job.evaluated)
    rate = machine.half.forward(ENCODED_ON_GPU)
    forward = relative(job, machine, machine.half, "forward") / (rate.value * job.world)
    loading = 1 / (job.nodes * job.cores * machine.decoded.value)
    if machine.cache is None or not passes:
        seconds, slower = passes * job.images * max(forward, loading), "cores" if loading > forward else "GPUs"
        formula = f"{passes} x images x max(1 / (GPUs x rate), 1 / (cores x rate)), here {slower}"
        return Phase(seconds, formula, (rate, machine.decoded))
    reading = job.view_bytes / (job.nodes * machine.cache.value)
    return Phase(
        job.images * (max(forward, loading) + (passes - 1) * max(forward, reading)),
        f"images x max(1 / (GPUs x rate), 1 / (cores x rate)) + {passes - 1} x images x max(1 / (GPUs x rate), "
        f"view / (machines x cache)), here {'cache' if reading > forward else 'GPUs'}",
        (rate, machine.decoded, machine.cache),
    )


def _clustering(job: Job, machine: Machine) -> Phase:
    """Clusterings * (products / rate of all GPUs), or the centroids' all-reduce where that is longer."""
    times, options = len(job.clustered), job.config.cluster
    if not times:
        return Phase(0.0, "none")
    search = job.search_flop(options.iterations, options.redo) / (machine.clustering.value * job.world)
    sums = 4 * (job.config.model.dim + 1) * sum(job.ks) * options.iterations * options.redo
    formula = f"{times} x 2 n d sum(K) x ({options.iterations} x {options.redo} + 1) / (GPUs x rate)"
    return Phase(times * max(search, reduce_seconds(sums, job, machine)), formula, (machine.clustering,))


def _rest(job: Job, machine: Machine) -> Phase:
    """Evaluations * similarities of the queries, written and read twice + epochs * checkpoint."""
    config, times = job.config, len(job.evaluated)
    neighbours = 6 * config.evaluation.queries * job.images / (machine.bandwidth.value * job.world)
    banks = config.model.dim * (sum(job.ks) + config.model.queue_size)
    held = 3 * job.encoder.parameters + banks + len(job.ks) * job.images
    seconds = times * neighbours + config.epochs * 4 * held / DISK.value
    formula = f"{times} x 6 B x queries x images / bandwidth + epochs x checkpoint / disk"
    return Phase(seconds, formula, (machine.bandwidth, DISK))
