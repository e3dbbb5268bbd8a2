"""Siamese PCL (Mo, Sun and Li, BMVC 2021): SimCLR on pairs of images that clusters tell to be alike, or not.

Before every epoch the backbone's features of all images are PCA-whitened and clustered. The epoch's images come in
pairs, half of them within a cluster and half across two. Of a batch of pairs (X1, X2), two views each, the loss is the
sum of

- NT-Xent of X1's two views among all X1, and the same of X2: means over their rows;
- the siamese metric loss of the pooled features of any two of the four views: six means, of which the two of an image
  with itself have the answer 1, and the four of X1 with X2 have 1 if the two are of one cluster, else 0;
- the cross-entropy of a linear classifier on the pooled features with the clusters: four means, one for each view.

Nothing in here sees a true label. docs/methods.md says what the authors' release does otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pcl_fast.clustering import cluster_row, draw_pairs, kmeans, pca_whitening, pick_backend
from pcl_fast.config import PRUNED_AFTER, Config
from pcl_fast.distributed import World, all_gather_shards
from pcl_fast.losses import SiameseResult, nt_xent, siamese
from pcl_fast.methods.base import FeatureSpec, Inputs, Method, Metric, Step
from pcl_fast.nn.encoder import Encoder, build_backbone
from pcl_fast.nn.precision import loss_dtype
from pcl_fast.nn.sync_batch_norm import sync_batch_norm
from pcl_fast.optim import Group, norms_and_biases_apart
from pcl_fast.seeds import Purpose, mix_seeds

# Of the classifier's new weights.
_DEVIATION = 0.01
# The classifier's learning rate in multiples of the run's. The release gives it a rate of 2.0 beside 1.0, without
# momentum and LARS; a momentum of 0.9 makes ten times as much of a rate.
_CLASSIFIER_RATE = 0.2
# The parts of a batch's pairs [2 views, pairs, 2 images] that the siamese loss compares: of X1, of X2, and across.
_WITHIN_AN_IMAGE = (((0, 0), (1, 0)), ((0, 1), (1, 1)))
_ACROSS = tuple(((i, 0), (j, 1)) for i in range(2) for j in range(2))
_LOSS, _ACCURACY = "loss", "accuracy of pairs and clusters, %"


class SiamesePCL(Method, name="siamese_pcl"):
    """An encoder, the metric's weights, and a classifier of the clusters that each E-step makes anew."""

    metrics: ClassVar = {
        "loss": Metric("total", _LOSS),
        "instance_loss": Metric("NT-Xent (sum of 2)", _LOSS),
        "siamese_loss": Metric("siamese (sum of 6)", _LOSS),
        "cluster_loss": Metric("cluster (sum of 4)", _LOSS),
        "siamese_accuracy": Metric("pairs of images", _ACCURACY),
        "cluster_accuracy": Metric("clusters", _ACCURACY),
    }
    settings = (
        "loss.temperature",
        "model.sync_bn",
        "cluster.ks",
        "cluster.iterations",
        "cluster.redo",
        "cluster.prune_starts",
        "cluster.backend",
        "cluster.split_by",
        "siamese.",
    )
    accumulation = "compare"

    def __init__(self, config: Config, world: World, images: int):
        """
        Raises:
            ValueError: an unknown architecture, or a k-means backend that is unknown or cannot be used here.
            MissingPackageError: the k-means backend is not installed.
        """
        super().__init__(config, world, images)
        # Better said now than at the first E-step.
        pick_backend(config.cluster.backend, world.device, loss_dtype(world.device), config.siamese.components)
        self.encoder = Encoder(config.model)
        if config.model.sync_bn:
            sync_batch_norm(self.encoder, world.group)
        self.metric = nn.Linear(self.encoder.width, 1)
        self.classifier = nn.Linear(self.encoder.width, config.cluster.ks[0])
        # The cluster of every image of the data set: what the order of an epoch follows from, too.
        self.register_buffer("assignment", torch.zeros(images, dtype=torch.int32))

    @classmethod
    def check(cls, config: Config, images: int, ranks: int) -> None:
        batch, ks, components = config.optim.batch_size, config.cluster.ks, config.siamese.components
        if len(ks) != 1:
            raise ValueError(f"--cluster.ks {' '.join(map(str, ks))}: {cls.name} makes one clustering; give one number")
        if not 2 <= ks[0] <= images // 2:
            raise ValueError(
                f"--cluster.ks {ks[0]}: pairs within and across clusters of {images} images need at least 2 clusters, "
                f"with 2 images each on average; use 2 to {images // 2}"
            )
        if batch % (2 * ranks) or batch < 4:
            raise ValueError(
                f"--optim.batch-size {batch} does not make two or more pairs of images that {ranks} ranks share "
                f"equally; use a multiple of {2 * ranks}{', 4 or more' if ranks == 1 else ''}"
            )
        with torch.device("meta"):  # its width, without its weights
            width = build_backbone(config.model)[1]
        most = min(width, images)
        if components > most:
            raise ValueError(
                f"--siamese.components {components} is more than the {width} features of --model.arch "
                f"{config.model.arch}, or than the {images} images; use at most {most}"
            )

    @classmethod
    def miniature(cls, config: Config) -> dict[str, Any]:
        # Clusters of 100 images, as CIFAR's 50,000 have them, and half of the features. The rate is that of SimCLR's
        # miniature, and was not tried.
        return {"cluster.ks": (50,), "siamese.components": 32, "optim.lr": 1.0, "optim.warmup_epochs": 2}

    def groups(self) -> list[Group]:
        classifier = Group([self.classifier.weight], lr_scale=_CLASSIFIER_RATE, adapt=False)
        bias = Group([self.classifier.bias], lr_scale=_CLASSIFIER_RATE, decay=False, adapt=False)
        return [*norms_and_biases_apart(nn.ModuleList([self.encoder, self.metric])), classifier, bias]

    def order(self, epoch: int) -> np.ndarray:
        """Pairs by the clusters of this epoch's E-step, the two of a pair in a row on one rank. The pairs of a step do
        not depend on the number of ranks.
        """
        pairs = self.config.optim.batch_size // 2
        steps = self.images // (2 * pairs)
        seed = mix_seeds(self.config.seed, Purpose.ORDER, epoch)
        drawn = draw_pairs(self.assignment.cpu().numpy(), steps, pairs, seed=seed)
        # Dealt out like cards: for every rank its pair's first image, then for every rank the second.
        return drawn.reshape(-1, self.world.size, 2).swapaxes(1, 2).ravel()

    # --- M-step ---------------------------------------------------------------------------------------------------

    def represent(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """Pooled and unit features of both views, [N, 2, width] and [N, 2, dim]."""
        # In one pass, as batch norm's statistics are of all views.
        pooled, unit = self.encode(self.encoder.both, torch.cat(inputs.views))
        return tuple(rows.unflatten(0, (2, -1)).transpose(0, 1) for rows in (pooled.to(unit.dtype), unit))

    def compare(self, made: tuple[torch.Tensor, ...], inputs: Inputs) -> Step:
        pooled, unit = (rows.transpose(0, 1).flatten(0, 1) for rows in made)
        clusters = self.assignment[inputs.index].long()
        instance = self._instance(_paired(unit))
        siamese_loss, metric = self._siamese(_paired(pooled), clusters.view(-1, 2))
        scores, targets = self.classifier(pooled), clusters.repeat(2)
        cluster = 4 * F.cross_entropy(scores, targets)
        loss = instance + siamese_loss + cluster
        parts = {"loss": loss, "instance_loss": instance, "siamese_loss": siamese_loss, "cluster_loss": cluster}
        accuracy = {
            "siamese_accuracy": 100 * metric.correct.float().mean(),
            "cluster_accuracy": 100 * (scores.argmax(1) == targets).float().mean(),
        }
        return Step(loss, {**{name: part.detach() for name, part in parts.items()}, **accuracy})

    def _instance(self, unit: torch.Tensor) -> torch.Tensor:
        """NT-Xent of the first images among the first, and of the second among the second."""
        temperature, group = self.config.loss.temperature, self.world.group
        return sum(nt_xent(unit[0, :, i], unit[1, :, i], temperature, group=group).mean() for i in range(2))

    def _siamese(self, pooled: torch.Tensor, clusters: torch.Tensor) -> tuple[torch.Tensor, SiameseResult]:
        """The sum of the six means; and the rows of all, of which those across images are the last."""
        alike = clusters[:, 0] == clusters[:, 1]
        compared = [*_WITHIN_AN_IMAGE, *_ACROSS]
        a, b = (torch.cat([pooled[part[side][0], :, part[side][1]] for part in compared]) for side in range(2))
        same = torch.cat([torch.ones_like(alike)] * len(_WITHIN_AN_IMAGE) + [alike] * len(_ACROSS))
        result = siamese(a, b, self.metric.weight[0], self.metric.bias, same)
        return len(compared) * result.loss.mean(), result

    # --- E-step ---------------------------------------------------------------------------------------------------

    def encoders(self) -> dict[str, nn.Module]:
        return {"query": self.encoder}

    def features(self) -> FeatureSpec:
        return FeatureSpec("query", self.encoder.width, pooled=True)

    def expects(self, epoch: int) -> bool:
        """Before every epoch, the first one too: there are no pairs without clusters."""
        return True

    def expect(self, features: torch.Tensor, epoch: int) -> list[dict[str, Any]]:
        """
        Raises:
            ValueError: all images are in one cluster, or not finite.
        """
        options, group = self.config.cluster, self.world.group
        k, seed = options.ks[0], mix_seeds(self.config.seed, Purpose.CLUSTERING, epoch)
        whitened = pca_whitening(features, self.config.siamese.components, group=group).apply(features, unit=True)
        found = kmeans(
            whitened,
            k,
            iterations=options.iterations,
            redo=options.redo,
            seed=seed,
            group=group,
            backend=options.backend,
            split_by=options.split_by,
            prune_after=PRUNED_AFTER if options.prune_starts else None,
        )
        self.assignment.copy_(all_gather_shards(found.assignment, group))
        if (self.assignment == self.assignment[0]).all():
            raise ValueError(
                "all images have come into one cluster: their features have collapsed, and there are no pairs across "
                f"clusters. Start again with a lower learning rate (--optim.lr {self.config.optim.lr:g})"
            )
        self._renew_classifier(mix_seeds(seed, self.encoder.width))
        return [cluster_row(k, self.assignment)]

    @torch.no_grad()
    def _renew_classifier(self, seed: int) -> None:
        """In place, as clusters have other numbers in every epoch; drawn on the CPU, so that all ranks draw alike."""
        weight = torch.empty(self.classifier.weight.shape)
        self.classifier.weight.copy_(weight.normal_(0, _DEVIATION, generator=torch.Generator().manual_seed(seed)))
        self.classifier.bias.zero_()

    def renewed(self) -> Sequence[nn.Parameter]:
        return list(self.classifier.parameters())

    def clusterings(self) -> dict[str, torch.Tensor]:
        return {f"{self.config.cluster.ks[0]}": self.assignment}


def _paired(rows: torch.Tensor) -> torch.Tensor:
    """[2 views x 2 images of each pair, d] as [2 views, pairs, 2 images, d]."""
    return rows.view(2, -1, 2, rows.shape[1])
