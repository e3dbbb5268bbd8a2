"""What is to be done, and on how many GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pcl_fast.config import Config
from pcl_fast.planning.constants import Constant
from pcl_fast.schedule import clusters_before, evaluates_before, rank_batch

VIEW_CHANNELS = 3


class Phase(NamedTuple):
    """Of the whole run: `seconds` as `formula` has it, of these constants."""

    name: str
    seconds: float
    formula: str
    constants: tuple[Constant, ...] = ()

    @property
    def hours(self) -> float:
        return self.seconds / 3600


# In the order in which tables and pictures have them; ours and the official way share the names.
ENCODER, LOSS, OPTIMISER, EXCHANGE, DATA = (
    "encoder",
    "loss",
    "optimiser, momentum",
    "exchange between GPUs",
    "waiting for data",
)
FEATURES, CLUSTERING, REST = "feature pass", "clustering", "evaluation, checkpoints"
PHASES = (ENCODER, LOSS, OPTIMISER, EXCHANGE, DATA, FEATURES, CLUSTERING, REST)


@dataclass(frozen=True)
class Job:
    """A recipe on `nodes` machines of `gpus` GPUs and `cores` cores each, with so many images."""

    config: Config
    images: int
    gpus: int
    nodes: int
    cores: int

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: names the flag, its value and what to use instead.
        """
        positive = {
            "--images": self.images,
            "--gpus": self.gpus,
            "--nodes": self.nodes,
            "--cores": self.cores,
            "--epochs": self.config.epochs,
            "--batch-size": self.batch,
        }
        for flag, value in positive.items():
            if value < 1:
                raise ValueError(f"{flag} must be positive, got {value}")
        if any(k < 1 for k in self.ks):
            raise ValueError(f"--ks must be positive numbers of clusters, got {self.ks}")
        if self.batch % self.world:
            raise ValueError(
                f"--batch-size {self.batch} does not divide among {self.world} GPUs; use a multiple of {self.world}"
            )
        if self.batch > self.images:
            raise ValueError(f"--batch-size {self.batch} is larger than the data set, --images {self.images}")
        if self.ks and max(self.ks) > self.images:
            raise ValueError(f"--ks: cannot make {max(self.ks)} clusters of {self.images} images; use smaller numbers")

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
    def steps(self) -> int:
        """Per epoch; what does not fill a batch is left out."""
        return self.images // self.batch

    @property
    def ks(self) -> tuple[int, ...]:
        return self.config.cluster.ks

    @property
    def clustered(self) -> set[int]:
        """Epochs with an E-step before them; that after the last epoch counts as one more epoch's."""
        return {epoch for epoch in range(self.config.epochs + 1) if clusters_before(self.config, epoch)}

    @property
    def evaluated(self) -> set[int]:
        """Epochs with an evaluation before them, counted likewise."""
        return {epoch for epoch in range(self.config.epochs + 1) if evaluates_before(self.config, epoch)}

    @property
    def prototype_epochs(self) -> int:
        """Epochs that are trained with prototypes."""
        return len(self.clustered - {self.config.epochs})

    @property
    def prototype_steps(self) -> int:
        return self.steps * self.prototype_epochs

    @property
    def warmup_steps(self) -> int:
        """Steps of InfoNCE alone."""
        return self.steps * self.config.epochs - self.prototype_steps

    @property
    def view_bytes(self) -> int:
        """Of one view as bytes."""
        return VIEW_CHANNELS * self.config.data.size**2

    def columns(self, prototypes: bool) -> int:
        """Keys and prototypes that a query is contrasted with."""
        negatives = self.config.loss.num_negatives
        drawn = sum(k if negatives is None else min(negatives, k) for k in self.ks)
        return self.config.model.queue_size + prototypes * drawn

    def search_flop(self, iterations: int, redo: int) -> float:
        """2 n d sum(K) for each of k-means' iterations and starts, and once for the labels."""
        return 2.0 * self.images * self.config.model.dim * sum(self.ks) * (iterations * redo + 1)

    @property
    def feature_bytes(self) -> int:
        """Of all features in float32."""
        return 4 * self.images * self.config.model.dim


def reduce_seconds(size: float, job: Job, gpu_link: float, node_link: float) -> float:
    """All-reduce of `size` bytes: a ring within every machine, then between machines.

    2 (g-1)/g size / gpu_link + 2 (m-1)/m size / node_link for g GPUs on each of m machines.
    """
    within = 2 * (job.gpus - 1) / job.gpus * size / gpu_link
    return within + 2 * (job.nodes - 1) / job.nodes * size / node_link
