"""PCL: prototypical contrastive learning (Li et al., ICLR 2021), and MoCo, which is PCL without prototypes.

A momentum encoder turns one view of an image into its key, on a batch shuffled so that batch statistics give nothing
away; the other view becomes the query. It is contrasted with the queue of earlier keys (InfoNCE), and for every
granularity with its own prototype among sampled others (ProtoNCE). The E-step clusters the momentum features, or if the
recipe says so the keys that the epoch has made anyway.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pcl_fast.clustering import cluster, cluster_row, obstacle, pick_backend
from pcl_fast.clustering.prototypes import Prototypes
from pcl_fast.config import PRESETS, PRUNED_AFTER, Config, setting
from pcl_fast.data import Batch
from pcl_fast.distributed import World, all_gather_rows
from pcl_fast.fitting import automatic_ks
from pcl_fast.losses import ProtoNCEResult, pcl_loss
from pcl_fast.methods.base import FeatureSpec, Inputs, Method, Metric, Step
from pcl_fast.methods.collapse import COLLAPSED, spread
from pcl_fast.nn.bank import KeyBank
from pcl_fast.nn.batch_norm import has_batch_norm
from pcl_fast.nn.branch import branch
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.momentum import MovingAverage, momentum_copy
from pcl_fast.nn.precision import loss_dtype
from pcl_fast.nn.queue import KeyQueue
from pcl_fast.nn.shuffle import BatchShuffle, Restore
from pcl_fast.nn.single_images import check_single_images
from pcl_fast.schedule import clusters_before, part_batch
from pcl_fast.seeds import Purpose, mix_seeds

# Multiples of the time, in steps, in which the momentum encoder forgets what it was; before that it tells little.
_PATIENCE = 5
_LOSS, _ACCURACY = "loss", "accuracy against the negatives, %"


class PCL(Method, name="pcl"):
    """Encoder, momentum encoder, queue of keys and prototypes. Without granularities (cluster.ks) it is MoCo."""

    metrics: ClassVar = {
        "loss": Metric("total", _LOSS),
        "instance_loss": Metric("InfoNCE", _LOSS),
        "instance_accuracy": Metric("instance", _ACCURACY),
        "prototype_loss": Metric("ProtoNCE", _LOSS),
        "prototype_accuracy": Metric("prototype", _ACCURACY),
        "key_spread": Metric("keys of different images", "1 - cosine similarity"),
    }
    settings = (
        "cluster.",
        "loss.temperature",
        "loss.num_negatives",
        "loss.backend",
        "model.momentum",
        "model.queue_size",
        "model.shuffle_bn",
        "model.bn_splits",
    )
    accumulation = "mean"
    divisible = True

    def __init__(self, config: Config, world: World, images: int):
        """
        Raises:
            ValueError: an unknown architecture, or a k-means backend that is unknown or cannot be used here.
            MissingPackageError: the k-means backend is not installed.
        """
        super().__init__(config, world, images)
        model, dtype = config.model, loss_dtype(world.device)
        # Better said now than at the first E-step.
        pick_backend(config.cluster.backend, world.device, dtype, model.dim)
        self.encoder = Encoder(model)
        self.queue = KeyQueue(model.queue_size, model.dim, dtype)
        self.momentum_encoder = momentum_copy(self.encoder)
        self.prototypes = Prototypes(config.cluster.ks, model.dim, images, dtype)
        by_keys = bool(config.cluster.ks) and config.cluster.features == "keys"
        self.bank = KeyBank(images, model.dim, dtype) if by_keys else None
        self.average = MovingAverage(self.momentum_encoder, self.encoder, model.momentum)
        # Batch statistics are all that would tell a key's place.
        self.shuffle = _shuffle(config, world) if has_batch_norm(self.encoder) else _unshuffled(config, world)

    @classmethod
    def check(cls, config: Config, images: int, ranks: int) -> None:
        rows, splits, parts = part_batch(config, ranks), config.model.bn_splits, config.optim.accumulate
        if rows % splits:
            batch = "batch" if parts == 1 else f"part of --optim.accumulate {parts}, a batch"
            raise ValueError(
                f"--model.bn-splits {splits} does not divide a rank's {batch} of {rows}; use a divisor of it, or an "
                f"--optim.batch-size that is a multiple of {ranks * parts * splits}"
            )
        if splits > 1 and config.model.head.endswith("bn"):
            raise ValueError(
                f"--model.bn-splits does not split the batch norm of --model.head {config.model.head}; use another head"
            )
        check_single_images(config, rows // splits)
        if config.cluster.ks and max(config.cluster.ks) > images:
            raise ValueError(
                f"cannot make {max(config.cluster.ks)} clusters of {images} images; set --cluster.ks to smaller "
                f"numbers, or to auto, which is {' '.join(map(str, automatic_ks(images)))} here"
            )

    @classmethod
    def miniature(cls, config: Config) -> dict[str, Any]:
        demo = PRESETS["demo"][1]
        names = [
            "model.momentum",
            "model.queue_size",
            "model.bn_splits",
            "loss.num_negatives",
            "optim.lr",
            "optim.weight_decay",
        ]
        if config.cluster.ks:
            names += ["cluster.ks", "cluster.warmup_epochs", "cluster.redo"]
        return {name: setting(demo, name) for name in names}

    def notes(self) -> list[str]:
        options, device = self.config.cluster, self.world.device
        found = []
        if self.config.model.shuffle_bn and not has_batch_norm(self.encoder):
            found.append(f"{self.config.model.arch} has no batch norm: keys need not be shuffled, and are not")
        if device.type != "cuda" or options.backend != "auto" or not options.ks:
            return found
        reason = obstacle(device, loss_dtype(device), self.config.model.dim)
        if reason:
            found.append(f"k-means runs in plain PyTorch, which is slower: its kernels' backend {reason}")
        return found

    def warning(self, means: dict[str, float], step: int) -> str | None:
        """A collapse: the momentum encoder makes the same of all images."""
        model, optim = self.config.model, self.config.optim
        key_spread = means.get("key_spread", 1.0)
        if key_spread >= COLLAPSED or step * (1 - model.momentum) < _PATIENCE:
            return None
        return (
            f"the momentum features of different images are nearly the same (cosine similarity {1 - key_spread:.3f} on "
            "average): they have collapsed, and the clusters mean nothing. If the images do differ, start again with "
            f"a lower learning rate (--optim.lr {optim.lr:g}) or a warm-up (--optim.warmup-epochs "
            f"{optim.warmup_epochs}), less weight decay (--optim.weight-decay {optim.weight_decay:g}) or a slower "
            f"momentum encoder (--model.momentum {model.momentum:g}, nearer to 1)"
        )

    # --- M-step ---------------------------------------------------------------------------------------------------

    def draw(self, batch: Batch, number: int) -> dict[str, torch.Tensor | int]:
        """The seed of the negatives and the shuffle's order (see BatchShuffle.order), each rank's own. Of several parts
        each has an order, a row.
        """
        seed, parts = self._seed(Purpose.NEGATIVES, number), self.config.optim.accumulate
        if parts == 1:
            order = self.shuffle.order(self._seed(Purpose.SHUFFLE, number))
            return {"seed": seed} if order is None else {"seed": seed, "order": order}
        orders = [self.shuffle.order(self._seed(Purpose.SHUFFLE, number, part)) for part in range(parts)]
        return {"seed": seed} if orders[0] is None else {"seed": seed, "order": torch.stack(orders)}

    def _seed(self, purpose: Purpose, number: int, *part: int) -> int:
        return mix_seeds(self.config.seed, purpose, number, self.world.rank, *part)

    def forward(self, inputs: Inputs) -> Step:
        (query_view, key_view), part, order = inputs.views, inputs.part, inputs.drawn.get("order")
        arrive = self.shuffle.begin(key_view, order if part is None or order is None else order[part.number])
        # While the key's views travel.
        if inputs.first:
            self.average.update()
        with branch(self._keys, self.world.device, arrive) as keys:
            query = self.encode(self.encoder, query_view)
        shuffled, restore = keys()
        key = restore(shuffled)
        loss = self.config.loss
        result = pcl_loss(
            query,
            key,
            self.queue.keys,
            self.prototypes.for_loss(),
            inputs.index,
            temperature=loss.temperature,
            num_negatives=loss.num_negatives,
            seed=inputs.drawn["seed"],
            backend=loss.backend,
            # The prototypes of all the step's images are columns, also of those that other parts encode.
            batch=None if part is None else part.whole.index,
        )
        return Step(result.loss, {**_metrics(result), **_spread(key)}, (key, inputs.index))

    @torch.no_grad()
    def _keys(self, views: torch.Tensor, restore: Restore) -> tuple[torch.Tensor, Restore]:
        """The keys of shuffled views, [N, dim] in `loss_dtype` and in their order, and what restores the batch's."""
        return self.encode(self.momentum_encoder, views).to(self.queue.keys.dtype), restore

    def phase(self, number: int) -> bool:
        """Before and after the first E-step."""
        return self.prototypes.found

    def after_update(self, carry: tuple[torch.Tensor, torch.Tensor], applied: torch.Tensor) -> None:
        """The queue takes all ranks' keys, whether or not the update was applied: they are good keys. So does the
        bank, once the first E-step has filled it.
        """
        key, index = carry
        keys = all_gather_rows(key, self.world.group)
        self.queue.enqueue(keys)
        if self._clusters_keys:
            self.bank.put(keys, all_gather_rows(index, self.world.group))

    # --- E-step ---------------------------------------------------------------------------------------------------

    def encoders(self) -> dict[str, nn.Module]:
        return {"query": self.encoder, "momentum": self.momentum_encoder}

    def key_queue(self) -> KeyQueue:
        return self.queue

    def features(self) -> FeatureSpec:
        return FeatureSpec("momentum", self.config.model.dim, from_bank=self._clusters_keys)

    @property
    def _clusters_keys(self) -> bool:
        """Whether the bank is full: the first E-step has no key of every image yet, and puts its features there."""
        return self.bank is not None and self.prototypes.found

    def expects(self, epoch: int) -> bool:
        return clusters_before(self.config, epoch)

    def expect(self, features: torch.Tensor | None, epoch: int) -> list[dict[str, Any]]:
        options, before = self.config.cluster, self.prototypes.sets()
        if features is None:
            features = self.bank.shard(self.world)
        elif self.bank is not None:
            self.bank.fill(features, self.world)
        warm = options.init == "previous" and bool(before)
        sets = cluster(
            features,
            options.ks,
            temperature=self.config.loss.temperature,
            iterations=options.warm_iterations if warm else options.iterations,
            redo=1 if warm else options.redo,
            alpha=options.alpha,
            fixed_concentration=options.fixed_concentration,
            seed=mix_seeds(self.config.seed, Purpose.CLUSTERING, epoch),
            init=[granularity.centroids for granularity in before] if warm else None,
            group=self.world.group,
            backend=options.backend,
            split_by=options.split_by,
            prune_after=PRUNED_AFTER if options.prune_starts else None,
        )
        self.prototypes.replace(sets)
        return [cluster_row(k, found.assignment) for k, found in zip(options.ks, sets, strict=True)]

    def clusterings(self) -> dict[str, torch.Tensor]:
        return {f"{len(found.centroids)}": found.assignment for found in self.prototypes.sets()}


def _shuffle(config: Config, world: World) -> BatchShuffle:
    if not config.model.shuffle_bn:
        return _unshuffled(config, world)
    return BatchShuffle(part_batch(config, world.size), world.group, config.model.bn_splits)


def _unshuffled(config: Config, world: World) -> BatchShuffle:
    return BatchShuffle(part_batch(config, world.size), None)


def _spread(key: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the keys [N, dim] of a batch, if it has two."""
    found = spread(key)
    return {} if found is None else {"key_spread": found}


def _metrics(result: ProtoNCEResult) -> dict[str, torch.Tensor]:
    metrics = {
        "loss": result.loss.detach(),
        "instance_loss": result.instance.loss.detach().mean(),
        "instance_accuracy": 100 * result.instance.correct.float().mean(),
    }
    if result.prototype:
        metrics["prototype_loss"] = torch.stack([part.loss.detach() for part in result.prototype]).mean()
        metrics["prototype_accuracy"] = 100 * torch.stack([part.correct for part in result.prototype]).float().mean()
    return metrics
