"""DeepCluster-v2 (Caron et al., NeurIPS 2020, appendix): each image's pseudo-label is its cluster of the epoch before.

Before every epoch spherical k-means clusters the embeddings that the epoch before has made of all images, once for each
of several heads. A head's weights are its centroids, which stay as they are until the next E-step; the loss is the
cross-entropy of both crops' embeddings. Heads take turns with the crops: head m was clustered by crop m mod 2.

The recipe is published for batches of 4096 with the learning rate 4.8. For the preset's batch of 256 the rate is 0.3:
lr x batch / 4096. See docs/methods.md.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pcl_fast.clustering import PrototypeSet, cluster_row, kmeans, pick_backend
from pcl_fast.clustering.prototypes import Prototypes
from pcl_fast.config import Config
from pcl_fast.distributed import World, all_gather_rows, all_gather_shards, shard_bounds
from pcl_fast.losses import pseudo_label_loss
from pcl_fast.methods.base import FeatureSpec, Inputs, Method, Metric, Step
from pcl_fast.nn.bank import KeyBank
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.precision import loss_dtype
from pcl_fast.nn.sync_batch_norm import sync_batch_norm
from pcl_fast.seeds import Purpose, mix_seeds

_CROPS = 2
_NO_LABEL = -1


class DeepClusterV2(Method, name="deepcluster_v2"):
    """An encoder; heads, which are prototypes with the pseudo-labels of all images; and a bank of both crops'
    embeddings, of which `visited` says which images the steps since the last E-step have renewed.
    """

    metrics: ClassVar = {
        "loss": Metric("cross-entropy", "loss"),
        "accuracy": Metric("pseudo-label", "accuracy among all prototypes, %"),
    }
    settings = (
        "cluster.ks",
        "cluster.iterations",
        "cluster.redo",
        "cluster.backend",
        "cluster.split_by",
        "loss.temperature",
        "model.sync_bn",
    )
    accumulation = "mean"

    def __init__(self, config: Config, world: World, images: int):
        """
        Raises:
            ValueError: an unknown architecture, or a k-means backend that is unknown or cannot be used here.
            MissingPackageError: the k-means backend is not installed.
        """
        super().__init__(config, world, images)
        dim, dtype = config.model.dim, loss_dtype(world.device)
        # Better said now than at the first E-step.
        pick_backend(config.cluster.backend, world.device, dtype, dim)
        self.encoder = Encoder(config.model)
        if config.model.sync_bn:
            sync_batch_norm(self.encoder, world.group)
        self.prototypes = Prototypes(config.cluster.ks, dim, images, torch.float32)
        self.banks = nn.ModuleList(KeyBank(images, dim, dtype) for _ in range(_CROPS))
        self.register_buffer("visited", torch.zeros(images, dtype=torch.bool))

    @classmethod
    def check(cls, config: Config, images: int, ranks: int) -> None:
        ks, batch = config.cluster.ks, config.optim.batch_size
        if not ks or min(ks) < 2:
            raise ValueError(
                f"--cluster.ks {' '.join(map(str, ks)) or '(none)'}: every head needs 2 prototypes or more; give a "
                "number for each head"
            )
        visited = images - images % batch
        if max(ks) > visited:
            raise ValueError(
                f"--cluster.ks {max(ks)} is more prototypes than an epoch has images to cluster: {visited} of "
                f"{images}, in steps of --optim.batch-size {batch}; use {visited} or less, and best a hundredth of that"
            )

    @classmethod
    def miniature(cls, config: Config) -> dict[str, Any]:
        # With this rate kNN rises from 0.57 to 0.84 in 8 epochs of the digits; no other was tried.
        return {"cluster.ks": (30, 30, 30), "optim.lr": 1.0, "optim.warmup_epochs": 2}

    # --- M-step ---------------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs) -> Step:
        # In one pass, as batch norm's statistics are of both crops.
        embeddings = self.encode(self.encoder, torch.cat(inputs.views))
        heads = self.prototypes.for_loss()
        if not heads:
            raise RuntimeError("images have no pseudo-labels before the first E-step")
        labels = [head.assignment[inputs.index].repeat(_CROPS) for head in heads]
        results = [
            pseudo_label_loss(embeddings, head.centroids, label, self.config.loss.temperature)
            for head, label in zip(heads, labels, strict=True)
        ]
        loss = torch.stack([result.loss.mean() for result in results]).mean()
        correct, labelled = (
            torch.stack(rows).sum() for rows in ([result.correct for result in results], [x >= 0 for x in labels])
        )
        metrics = {"loss": loss.detach(), "accuracy": 100 * correct / labelled.clamp(min=1)}
        of_crops = torch.stack(embeddings.detach().to(self.banks[0].keys.dtype).chunk(_CROPS), dim=1)
        return Step(loss, metrics, (of_crops, inputs.index))

    def after_update(self, carry: tuple[torch.Tensor, torch.Tensor], applied: torch.Tensor) -> None:
        """The banks take all ranks' embeddings, whether or not the update was applied: they are of the encoder as it
        was.
        """
        of_crops, index = (all_gather_rows(rows, self.world.group) for rows in carry)
        for bank, rows in zip(self.banks, of_crops.unbind(1), strict=True):
            bank.put(rows, index)
        self.visited.index_fill_(0, index, True)

    # --- E-step ---------------------------------------------------------------------------------------------------

    def encoders(self) -> dict[str, nn.Module]:
        return {"query": self.encoder}

    def features(self) -> FeatureSpec:
        """The first E-step has no embeddings yet: it gets features."""
        return FeatureSpec("query", self.config.model.dim, from_bank=self.prototypes.found)

    def expects(self, epoch: int) -> bool:
        return True

    def expect(self, features: torch.Tensor | None, epoch: int) -> list[dict[str, Any]]:
        """Images that no step has visited since the last E-step are not clustered, and have no label."""
        if features is not None:
            self._begin(features)
        images = self.visited.nonzero().view(-1)
        begin, end = shard_bounds(self.images, self.world.rank, self.world.size)
        mine = self.visited[begin:end]
        of_crops = [bank.shard(self.world)[mine] for bank in self.banks]
        sets = [self._cluster(head, k, of_crops[head % _CROPS], images, epoch) for head, k in enumerate(self._ks)]
        self.prototypes.replace(sets)
        self.visited.zero_()
        return [
            cluster_row(k, head.assignment[head.assignment != _NO_LABEL])
            for k, head in zip(self._ks, sets, strict=True)
        ]

    @property
    def _ks(self) -> tuple[int, ...]:
        return self.config.cluster.ks

    def _begin(self, features: torch.Tensor) -> None:
        """Fill the banks with every rank's features of its shard, the same for both crops."""
        self.banks[0].fill(features, self.world)
        for bank in self.banks[1:]:
            bank.keys.copy_(self.banks[0].keys)
        self.visited.fill_(True)

    def _cluster(self, head: int, k: int, features: torch.Tensor, images: torch.Tensor, epoch: int) -> PrototypeSet:
        """The prototypes and pseudo-labels of a head.

        Args:
            features: [n_r, dim], this rank's embeddings of visited images.
            images: int64 [n], the visited images of all ranks.
        """
        options = self.config.cluster
        found = kmeans(
            features,
            k,
            iterations=options.iterations,
            redo=options.redo,
            seed=mix_seeds(self.config.seed, Purpose.CLUSTERING, epoch, head),
            group=self.world.group,
            backend=options.backend,
            split_by=options.split_by,
            spherical=True,
        )
        labels = torch.full((self.images,), _NO_LABEL, dtype=torch.int32, device=self.world.device)
        labels[images] = all_gather_shards(found.assignment, self.world.group)
        concentration = torch.full((k,), self.config.loss.temperature, device=self.world.device)
        return PrototypeSet(found.centroids, concentration, labels)

    def clusterings(self) -> dict[str, torch.Tensor]:
        """By number of prototypes, and where heads have equally many, by the head's number too. Images without a label
        (-1) count as a cluster.
        """
        names = [f"{k}" if self._ks.count(k) == 1 else f"{k}, head {head}" for head, k in enumerate(self._ks, 1)]
        return {name: head.assignment for name, head in zip(names, self.prototypes.sets(), strict=True)}
