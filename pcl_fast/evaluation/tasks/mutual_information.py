"""Mutual information with the classes over a run's epochs: Figure 3b."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

from pcl_fast.clustering import kmeans, pick_backend
from pcl_fast.data import ImageSet
from pcl_fast.distributed import all_gather_shards, shard_bounds
from pcl_fast.errors import UserError
from pcl_fast.evaluation.labelled import holds_labels
from pcl_fast.evaluation.mutual_information import cluster_information, feature_information
from pcl_fast.evaluation.pictures import names_of
from pcl_fast.evaluation.tasks.base import Context, Outcome, Row, Task
from pcl_fast.pretrained import Pretrained
from pcl_fast.run.checkpoint import kept_checkpoints
from pcl_fast.seeds import Purpose, mix_seeds

# Images per cluster where no run says it; about what 25,000 clusters of ImageNet have.
_PER_CLUSTER = 50


@dataclass(frozen=True)
class _Run:
    """A run to draw: its name, and its checkpoints in order."""

    name: str
    checkpoints: Sequence[Path]


@dataclass(frozen=True, kw_only=True)
class MutualInformation(Task, name="mutual-information", scores="momentum"):
    """How much features, prototypes and clusters tell about the classes, over a run's epochs (Figure 3b).

    CHECKPOINT is the folder of a run that has kept checkpoints (--checkpoint.keep-every of pcl_fast.train). --data is a
    folder of class folders (or tar shards), or one that has them in its folder train.
    """

    against: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Another run's folder, to be drawn in the same picture, MoCo's for instance."""
    k: int | None = None
    """Number of clusters. None: the smallest that the run has prototypes for, or else the other run; if neither has
    any, one for every 50 images."""
    images: int = 50000
    """Images that are looked at, drawn once; a smaller data set has fewer."""

    @classmethod
    def obstacle(cls, data: Path, checkpoint: Path) -> str | None:
        if len(kept_checkpoints(checkpoint)) < 2:
            return f"{checkpoint} is not the folder of a run that has kept checkpoints"
        return holds_labels(data)

    def check(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"--k must be positive, got {self.k}")
        if self.images < 2:
            raise ValueError(f"--images must be at least 2, got {self.images}")

    def run(self, context: Context) -> Outcome:
        last = [context.pretrained]
        if self.against is not None:
            last.append(context.read(self.against, self.encoder or self.scores))
        runs = self._runs(last)
        images, labels = context.training(self.data, self.format)
        k = self._clusters(last, len(images))
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, Purpose.EVALUATION))
        chosen = torch.randperm(len(images), generator=generator)[: self.images].sort().values
        found = self._measure_all(runs, k, images, labels, chosen, context)
        rows = [
            Row(f"{run.name}, epoch {epoch}", scores)
            for run in runs
            for epoch, *scores in (found[str(path)] for path in run.checkpoints)
        ]
        columns = ("instance features", "prototypes", f"cluster ids (k = {k})")
        curves = {run.name: [found[str(path)] for path in run.checkpoints] for run in runs}
        protocol = self._protocol(context.pretrained, k, len(images), int(labels.max()) + 1, len(chosen))
        return Outcome(protocol, columns, rows, [], partial(_draw, columns=columns, curves=curves), digits=3)

    def _runs(self, last: Sequence[Pretrained]) -> list[_Run]:
        """Return the runs with their checkpoints; of two of the same epoch the last, whose prototypes may be newer."""
        paths = [self.checkpoint] if self.against is None else [self.checkpoint, self.against]
        runs = []
        for name, path, pretrained in zip(names_of(paths), paths, last, strict=True):
            twin = f"checkpoint-{pretrained.facts.get('epoch', 0):04d}.pt"
            *earlier, newest = kept_checkpoints(path) or [path]
            runs.append(_Run(name, [*(file for file in earlier if file.name != twin), newest]))
        return runs

    def _clusters(self, last: Sequence[Pretrained], images: int) -> int:
        """Return k.

        Raises:
            UserError: it is more than there are images.
        """
        offered = [[len(found.centroids) for found in pretrained.prototypes] for pretrained in last]
        k = self.k or next((min(ks) for ks in offered if ks), max(1, images // _PER_CLUSTER))
        if k > images:
            raise UserError(f"cannot make {k} clusters of {images} images; use a smaller --k")
        return k

    def _measure_all(
        self,
        runs: Sequence[_Run],
        k: int,
        images: ImageSet,
        labels: torch.Tensor,
        chosen: torch.Tensor,
        context: Context,
    ) -> dict[str, list[float]]:
        """Return [epoch, the scores of the columns] of every checkpoint, by its path."""
        saved = context.continuation.load()
        found: dict[str, list[float]] = saved["found"] if saved else {}
        paths = [path for run in runs for path in run.checkpoints if str(path) not in found]
        with context.continuation.saving():
            for path in paths:
                pretrained = context.read(path, self.encoder or self.scores)
                context.say(f"{path}")
                scores = self._measure(k, images, labels[chosen], chosen, replace(context, pretrained=pretrained))
                found[str(path)] = [pretrained.facts.get("epoch", 0), *scores]
                context.continuation.reached(len(found), lambda: {"found": found})
        return found

    def _measure(
        self, k: int, images: ImageSet, labels: torch.Tensor, chosen: torch.Tensor, context: Context
    ) -> tuple[float, float, float]:
        """Return the scores of the checkpoint of `context`; labels are those of the chosen images."""
        prototypes = next((found for found in context.pretrained.prototypes if len(found.centroids) == k), None)
        if prototypes is None:
            features, centroids = self._cluster(k, images, chosen, context)
        else:
            data = self.reading(context.pretrained)
            shard = context.encode(images.subset(chosen.tolist()), data, "chosen images").unit()
            features, centroids = all_gather_shards(shard, context.world.group), prototypes.centroids.to(shard.device)
        backend = pick_backend("auto", features.device, features.dtype, features.shape[1])
        assignment = backend.nearest(features, centroids)
        return (
            float(feature_information(features, labels, seed=self.seed).mean()),
            float(feature_information(centroids[assignment], labels, seed=self.seed).mean()),
            cluster_information(assignment, labels),
        )

    def _cluster(
        self, k: int, images: ImageSet, chosen: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cluster all images; return (features of the chosen ones, prototypes)."""
        world = context.world
        shard = context.encode(images, self.reading(context.pretrained), "training images").unit()
        found = kmeans(shard, k, seed=mix_seeds(self.seed, Purpose.EVALUATION), group=world.group)
        begin, end = shard_bounds(len(images), world.rank, world.size)
        mine = chosen[(chosen >= begin) & (chosen < end)] - begin
        return all_gather_shards(shard[mine.to(shard.device)], world.group), F.normalize(found.centroids, dim=1)

    def _protocol(self, pretrained: Pretrained, k: int, images: int, classes: int, chosen: int) -> tuple[str, ...]:
        data = self.reading(pretrained)
        kind = "backbone" if pretrained.head is None else "head"
        return (
            f"mutual information with the classes, in nats: {chosen} of {images} training images of {classes} "
            f"classes, centre crops of {data.size} px (shorter side {data.resize}), {kind} features at unit length, of "
            f"the {pretrained.encoder} encoder",
            "features and prototypes: Ross's estimate (2014; 3 neighbours) for each dimension, and the mean of the "
            "dimensions; clusters: from the frequencies",
            f"an image's prototype is the nearest of the k = {k} that the checkpoint holds, which are those of the "
            "last E-step before it was saved; where it holds none, of those of k-means of all training images (20 "
            "iterations, one start)",
            "the paper says neither which k nor how many images its Figure 3b has",
        )


def _draw(figure: Figure, columns: Sequence[str], curves: dict[str, list[list[float]]]) -> None:
    """Draw the estimates on the left and the clusters on the right."""
    left, right = figure.subplots(1, 2)
    for number, (name, points) in enumerate(curves.items()):
        epochs, *scores = zip(*points, strict=True)
        for axes, line, style in zip((left, left, right), range(3), ("o--", "o-", "o-"), strict=True):
            axes.plot(epochs, scores[line], style, color=f"C{number}", label=f"{name}: {columns[line]}")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("mutual information with the classes, nats")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
