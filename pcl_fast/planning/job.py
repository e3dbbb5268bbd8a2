"""What is to be done, on how many GPUs, and in which phases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from pcl_fast.config import Config, DataConfig
from pcl_fast.planning.encoder import EncoderCount, count
from pcl_fast.planning.figures import Constant
from pcl_fast.schedule import clusters_before, evaluates_before, part_batch, rank_batch

# In the order in which tables and pictures have them; ours and the official way share the names.
PHASES = (
    "encoder", "loss", "optimiser, momentum", "exchange between GPUs", "waiting for data", "feature pass", "clustering",
    "evaluation, checkpoints",
)  # fmt: skip
ENCODER, LOSS, OPTIMISER, EXCHANGE, DATA, FEATURES, CLUSTERING, REST = PHASES


class Phase(NamedTuple):
    """What a phase costs: `seconds` as `formula` has it, of these constants."""

    seconds: float
    formula: str
    constants: tuple[Constant, ...] = ()

    @property
    def hours(self) -> float:
        return self.seconds / 3600


@dataclass(frozen=True)
class Job:
    """A recipe on `nodes` machines of `gpus` GPUs and `cores` cores each; the batch divides among all GPUs."""

    config: Config
    images: int
    gpus: int
    nodes: int
    cores: int

    @property
    def world(self) -> int:
        """GPUs in all."""
        return self.gpus * self.nodes

    @property
    def batch(self) -> int:
        return self.config.optim.batch_size

    @property
    def rows(self) -> int:
        """Images per GPU and step."""
        return rank_batch(self.config, self.world)

    @property
    def parts(self) -> int:
        """Of a step, one after another."""
        return self.config.optim.accumulate

    @property
    def part_rows(self) -> int:
        """Images that a GPU encodes at a time."""
        return part_batch(self.config, self.world)

    @property
    def steps(self) -> int:
        """Steps per epoch; what does not fill a batch is left out."""
        return self.images // self.batch

    @property
    def ks(self) -> tuple[int, ...]:
        return self.config.cluster.ks

    def of_size(self, data: DataConfig) -> Job:
        """The same with crops of one size, see DataConfig.at."""
        return replace(self, config=replace(self.config, data=data))

    def mean(self, numbers: Callable[[Job], list[float]]) -> list[float]:
        """The means over all epochs of numbers that depend on the size of their crops."""
        sizes = Counter(self.config.data.at(epoch) for epoch in range(self.config.epochs))
        weighted = [[number * count for number in numbers(self.of_size(data))] for data, count in sizes.items()]
        return [sum(column) / self.config.epochs for column in zip(*weighted, strict=True)]

    @property
    def passes(self) -> set[int]:
        """Epochs with a pass of the encoder over all images before them, for clustering and evaluation together. Where
        keys are clustered, the first clustering has one alone.
        """
        by_pass = sorted(self.clustered)[:1] if self.config.cluster.features == "keys" else self.clustered
        return self.evaluated.union(by_pass)

    @property
    def clustered(self) -> set[int]:
        """Epochs with a clustering before them; `config.epochs` stands for that after the last one."""
        return {epoch for epoch in range(self.config.epochs + 1) if clusters_before(self.config, epoch)}

    @property
    def evaluated(self) -> set[int]:
        """Epochs with an evaluation before them, likewise."""
        return {epoch for epoch in range(self.config.epochs + 1) if evaluates_before(self.config, epoch)}

    @property
    def prototype_epochs(self) -> int:
        """Epochs that are trained with prototypes."""
        return len(self.clustered - {self.config.epochs})

    @property
    def encoder(self) -> EncoderCount:
        return count(self.config.model, self.config.data.size)

    @property
    def view_bytes(self) -> int:
        """Bytes of one view, a byte for each of three colours."""
        return 3 * self.config.data.size**2

    @property
    def feature_bytes(self) -> int:
        """Bytes of all features in float32."""
        return 4 * self.images * self.config.model.dim

    def columns(self, prototypes: bool) -> int:
        """Keys and prototypes that a query is contrasted with."""
        negatives = self.config.loss.num_negatives
        drawn = sum(k if negatives is None else min(negatives, k) for k in self.ks)
        return self.config.model.queue_size + prototypes * drawn

    def search_flop(self, searches: int) -> float:
        """2 n d sum(K) for each of k-means' searches: those of its iterations, and those for the labels."""
        return 2.0 * self.images * self.config.model.dim * sum(self.ks) * searches


def over_run(job: Job, step: Callable[[bool], list[Phase]], data: Phase) -> list[Phase]:
    """All steps' phases: the seconds of those of one step, with prototypes and without, times the steps of either kind.

    The last is waiting for data: max(0, seconds of loading a step's images - those of the step).
    """
    with_prototypes = job.steps * job.prototype_epochs
    without = job.steps * job.config.epochs - with_prototypes
    late, early = (
        [*phases, data._replace(seconds=max(0.0, data.seconds - sum(phase.seconds for phase in phases)))]
        for phases in (step(True), step(False))
    )
    return [
        phase._replace(seconds=with_prototypes * phase.seconds + without * other.seconds)
        for phase, other in zip(late, early, strict=True)
    ]
