"""Ours: what every phase of a run takes. Each function states its formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from pcl_fast.config import PRUNED_AFTER, ClusterConfig, ModelConfig
from pcl_fast.nn.fusion import WAYS
from pcl_fast.planning.encoder import Work, count
from pcl_fast.planning.figures import Constant
from pcl_fast.planning.job import PHASES, Job, Phase, over_run
from pcl_fast.planning.rates import Machine, MeasuredStep, Precision
from pcl_fast.schedule import ENCODED_ON_GPU

# Per parameter: SGD reads three float32 and writes two, the momentum encoder reads two and writes one.
UPDATE_BYTES = 4 * (5 + 3)
DISK = Constant("writing a checkpoint", 1e9, "B/s", "assumed: a local SSD")
_BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends together
SAVED = Constant(
    "bytes that fused batch norm saves an image and step, ResNet-50 at 224 px",
    (476 - 353 + 138 - 79) * 1e6,
    "B",
    "assumed: counted in kernels/batch_norm.py's loads and stores, 353 MB with it and 476 without; 79 and 138 in the "
    "key's forward pass",
)
REACHED = Constant("of the memory's bandwidth", 0.89, "", "assumed: 0.8 of a V100's 0.9 TB/s")
FUSED_FORWARD = Constant(
    "speed of a fused forward pass",
    1.5,
    "",
    "assumed: of the 1.9 by which TensorRT, which fuses the same, is faster than PyTorch on a V100",
)
# What follows from data/loaders/feeds.py: cores that decode stop where a cache is more than so many times as fast.
HELPED_UP_TO = 4
_LOSS_REST = Constant(
    "loss less reading the banks once",
    42e-6,
    "s",
    "assumed: as on an H200, where it takes 46 us and reading at the memory's bandwidth 3.5 of these",
)


def plan(job: Job, machine: Machine) -> dict[str, Phase]:
    """The phases of a run by their names in job.PHASES, in that order: as the code was measured, or as code of its kind
    was published.
    """
    return _phases(job, machine, _encoder, 1.0)


def projected(job: Job, machine: Machine) -> dict[str, Phase]:
    """The same with what fused batch norm and convolutions should bring, which nobody has measured."""
    return _phases(job, machine, _fused_encoder, FUSED_FORWARD.value)


def _phases(
    job: Job, machine: Machine, encode: Callable[[Job, Machine], Phase], forward_gain: float
) -> dict[str, Phase]:
    steps = _steps(job, machine, encode)
    rest = (_features(job, machine, forward_gain), _clustering(job, machine), _rest(job, machine))
    return dict(zip(PHASES, (*steps, *rest), strict=True))


def _steps(job: Job, machine: Machine, encode: Callable[[Job, Machine], Phase]) -> list[Phase]:
    """All steps' phases: the mean over the sizes that crops have, as if all epochs had each."""
    update = UPDATE_BYTES * job.encoder.parameters / machine.bandwidth.value
    optimiser = Phase(update, "steps x 32 B x parameters / bandwidth", (machine.bandwidth,))
    loading = job.batch / (job.nodes * job.cores * machine.decoded.value)
    data = Phase(loading, "steps x max(0, batch / (cores x rate) - step)", (machine.decoded,))

    def at_size(sized: Job) -> list[Phase]:
        encoder = encode(sized, machine)
        exchange = _exchange(sized, machine, encoder.seconds)
        return over_run(sized, lambda prototypes: [encoder, _loss(job, machine, prototypes), optimiser, exchange], data)

    phases = at_size(job)
    means = job.mean(lambda sized: [phase.seconds for phase in at_size(sized)])
    return [phase._replace(seconds=seconds) for phase, seconds in zip(phases, means, strict=True)]


def relative(job: Job, machine: Machine, precision: Precision, pass_name: str) -> float:
    """How much longer an image takes than in ResNet-50 at 224 px, whose rates are known.

    By (FLOP / peak + bytes / bandwidth): the same share of it is reached, whatever the encoder.
    """

    def bound(work: Work) -> float:
        return work.flop / precision.peak + work.elements * precision.itemsize / machine.bandwidth.value

    return bound(getattr(job.encoder, pass_name)) / bound(getattr(count(ModelConfig(), 224), pass_name))


def supervised(job: Job, machine: Machine, precision: Precision) -> tuple[float, tuple[Constant, ...]]:
    """Seconds of a supervised step: N / (rate on so many GPUs * rate with batch N, or a part of it, by that with the
    published batch) * relative encoder.
    """
    rate = precision.training(job.gpus)
    share = precision.share(job.part_rows, precision.batch)
    seconds = job.rows / (rate.value * share.value) * relative(job, machine, precision, "training")
    return seconds, (rate, share) if share.value != 1 else (rate,)


def _encoder(job: Job, machine: Machine) -> Phase:
    """Query forward and backward, key forward: as measured in the fastest way, or the supervised step's seconds *
    counted FLOP ratio.
    """
    formula = "steps x (1 + forward / training) x N / rate"
    step = _fastest(job, machine)
    if step is None:
        seconds, constants = supervised(job, machine, machine.half)
        return Phase(seconds * job.encoder.step, formula, constants)
    share = machine.half.share(job.part_rows, step.batch)
    together, alone = (machine.half.training(gpus) for gpus in (job.gpus, 1))
    rate = step.rate.value * together.value / alone.value * share.value
    seconds = job.rows / rate * relative(job, machine, machine.half, "training")
    matters = {step.rate: True, together: job.gpus > 1, share: share.value != 1}
    return Phase(seconds, formula, tuple(constant for constant, does in matters.items() if does))


def _fastest(job: Job, machine: Machine) -> MeasuredStep | None:
    """What was measured of a step, in the way that a run would choose. For several GPUs captured steps are left out:
    their pieces have not been measured.
    """
    usable = [step for step in machine.steps if job.world == 1 or not step.captured]

    def rate(step: MeasuredStep) -> float:
        return machine.half.share(job.part_rows, step.batch).value * step.rate.value

    return max(usable, key=rate, default=None)


def _fused_encoder(job: Job, machine: Machine) -> Phase:
    """`_encoder` less the bytes that fusion saves, by the memory's bandwidth, unless that was measured with it; but not
    faster than such code was published to train.
    """
    eager, step = _encoder(job, machine), _fastest(job, machine)
    if step is not None and step.way != WAYS[0]:
        return eager
    share = job.encoder.training.elements / count(ModelConfig(), 224).training.elements
    saved = SAVED.value * share / (REACHED.value * machine.bandwidth.value)
    seconds, constants = eager.seconds - job.rows * saved, (*eager.constants, SAVED, REACHED, machine.bandwidth)
    if machine.fused is not None:
        least, others = supervised(job, machine, machine.fused)
        if least * job.encoder.step > seconds:
            seconds, constants = least * job.encoder.step, others
    return Phase(seconds, eager.formula, constants)


def _loss(job: Job, machine: Machine, prototypes: bool) -> Phase:
    """Half-precision banks read once for each part of a step, and what a part's kernels take beside that; or columns *
    measured * max(1, N / 64) for the N rows of each part, as up to 64 rows share a pass over the banks.
    """
    columns = job.parts * job.columns(prototypes)
    if machine.loss is not None:
        seconds = machine.loss.value * columns * max(1.0, job.part_rows / 64)
        return Phase(seconds, "steps x columns x measured x max(1, N / 64)", (machine.loss,))
    seconds = 2 * columns * job.config.model.dim / machine.bandwidth.value + job.parts * _LOSS_REST.value
    return Phase(seconds, "steps x (2 B x d x columns / bandwidth + rest)", (_LOSS_REST, machine.bandwidth))


def reduce_seconds(size: float, job: Job, machine: Machine) -> float:
    """All-reduce of `size` bytes: a ring within every machine, then between machines.

    2 (g-1)/g size / gpu_link + 2 (m-1)/m size / node_link for g GPUs on each of m machines.
    """
    within = 2 * (job.gpus - 1) / job.gpus * size / machine.gpu_link.value
    return within + 2 * (job.nodes - 1) / job.nodes * size / machine.node_link.value


def gradients_seconds(job: Job, machine: Machine, backward: float) -> float:
    """What of the gradients' all-reduce does not fit beside the backward pass (of a step's last part, if it has
    several), which the last bucket never does.
    """
    backward /= job.parts
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


def _features(job: Job, machine: Machine, gain: float) -> Phase:
    """Passes * images * max(forward pass over all GPUs, loading), each at its epoch's size; with a cache all but the
    first of a size read instead, and decode meanwhile if the cache is the slowest. gain: by which the forward pass is
    faster than published, where it is not measured.
    """
    passes = Counter(job.config.data.at(epoch) for epoch in job.passes)
    rate = machine.forward or machine.half.forward(ENCODED_ON_GPU)
    gain = 1.0 if machine.forward else gain
    loading = 1 / (job.nodes * job.cores * machine.decoded.value)
    seconds, slower = 0.0, set()
    for data, times in passes.items():
        sized = job.of_size(data)
        forward = relative(sized, machine, machine.half, "forward") / (gain * rate.value * job.world)
        later, name = (loading, "cores") if machine.cache is None else _reading(sized, machine, machine.cache, forward)
        seconds += job.images * (max(forward, loading) + (times - 1) * max(forward, later))
        slower.add(name if later > forward else "GPUs")
    total = passes.total()
    constants = (rate, machine.decoded) + (() if gain == 1 else (FUSED_FORWARD,))
    here = " and ".join(sorted(slower))
    if machine.cache is None or not total:
        formula = f"{total} x images x max(1 / (GPUs x rate), 1 / (cores x rate)), here {here}"
        return Phase(seconds, formula, constants)
    return Phase(
        seconds,
        f"images x max(1 / (GPUs x rate), 1 / (cores x rate)) + {total - len(passes)} x images x "
        f"max(1 / (GPUs x rate), 1 / (machines x (cache / view))), here {here}; cores help a cache of at most "
        f"{HELPED_UP_TO} times their rate: min(1, share) x (cache / view + cores x rate) instead of cache / view",
        (*constants, machine.cache, machine.helped),
    )


def _reading(job: Job, machine: Machine, cache: Constant, forward: float) -> tuple[float, str]:
    """Seconds an image from all machines' caches, and what sets them. Where the GPUs' `forward` would wait for them,
    the cores decode other images meanwhile, unless the cache is too fast for that to matter.
    """
    read, decoded = cache.value / job.view_bytes, job.cores * machine.decoded.value
    # What is measured above 1 is noise: how fast a shared machine's cores decode varies.
    together = min(1.0, machine.helped.value) * (read + decoded)
    if 1 / (job.nodes * read) <= forward or read > HELPED_UP_TO * decoded:
        return 1 / (job.nodes * read), "cache"
    return 1 / (job.nodes * together), "cache and cores"


def _clustering(job: Job, machine: Machine) -> Phase:
    """Clusterings * (products / rate of all GPUs), or the centroids' all-reduce where that is longer. Those that begin
    with the last prototypes, all but the first, have fewer iterations and one start.
    """
    times, options = len(job.clustered), job.config.cluster
    if not times:
        return Phase(0.0, "none")
    warm = times - 1 if options.init == "previous" else 0
    kinds = ((times - warm, *_iterations(options)), (warm, options.warm_iterations, 1))
    seconds, formulas = 0.0, []
    for count_of, iterations, ends in kinds:
        search = job.search_flop(iterations + ends) / (machine.clustering.value * job.world)
        sums = 4 * (job.config.model.dim + 1) * sum(job.ks) * iterations
        seconds += count_of * max(search, reduce_seconds(sums, job, machine))
        if count_of:
            formulas.append(f"{count_of} x 2 n d sum(K) x ({iterations} + {ends})")
    return Phase(seconds, f"({' + '.join(formulas)}) / (GPUs x rate)", (machine.clustering,))


def _iterations(options: ClusterConfig) -> tuple[int, int]:
    """Return k-means' iterations in all its starts, and how many of these come to an end, with a search for labels."""
    if not options.prune_starts:
        return options.iterations * options.redo, options.redo
    return PRUNED_AFTER * (options.redo - 1) + options.iterations, 1


def _rest(job: Job, machine: Machine) -> Phase:
    """Evaluations * similarities of the queries, written and read twice + epochs * checkpoint."""
    config, times = job.config, len(job.evaluated)
    neighbours = 6 * config.evaluation.queries * job.images / (machine.bandwidth.value * job.world)
    banks = config.model.dim * (sum(job.ks) + config.model.queue_size)
    if config.cluster.features == "keys":
        banks += config.model.dim * job.images / 2  # of half precision
    held = 3 * job.encoder.parameters + banks + len(job.ks) * job.images
    seconds = times * neighbours + config.epochs * 4 * held / DISK.value
    formula = f"{times} x 6 B x queries x images / bandwidth + epochs x checkpoint / disk"
    return Phase(seconds, formula, (machine.bandwidth, DISK))
