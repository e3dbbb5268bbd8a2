"""SwAV (Caron et al., NeurIPS 2020): every crop of an image predicts the codes of its two large crops.

The scores of an embedding are its products with prototypes, which are learned and of unit length. The codes of a batch
are made of the scores by Sinkhorn's algorithm, so that all prototypes have the same share of the images of all ranks,
and of a queue of former ones once it is full. A crop's softmax of its scores is to be the code of each large crop but
itself. There are no negatives, no momentum encoder and no E-step. The recipe is that of a batch of 256 and 200 epochs;
see docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from pcl_fast.augmentations import View, check_areas, multi_crop, small_side
from pcl_fast.config import Config, view_of
from pcl_fast.crop_sizes import in_proportion
from pcl_fast.data import Batch
from pcl_fast.distributed import World
from pcl_fast.losses import sinkhorn, swapped_prediction
from pcl_fast.methods.base import Inputs, Method, Metric, Step
from pcl_fast.methods.collapse import COLLAPSED, spread
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.precision import autocast
from pcl_fast.nn.single_images import check_single_images
from pcl_fast.nn.small_crops import check_crop_size
from pcl_fast.nn.sync_batch_norm import sync_batch_norm
from pcl_fast.schedule import rank_batch

# Crops that have a code.
_LARGE = 2
_QUEUE = "queue"


class SwAV(Method, name="swav"):
    """An encoder, prototypes, and this rank's part of the queue: [2 large crops, size / ranks, dim], the newest first.

    The queue takes the embeddings of every step from the first on, which is not seen before it is used.
    """

    metrics: ClassVar = {
        "loss": Metric("swapped prediction", "loss"),
        "accuracy": Metric("the other crop's prototype", "accuracy among all prototypes, %"),
        "spread": Metric("1 - cosine of two images", "spread of the embeddings"),
    }
    settings = ("swav.", "loss.temperature", "model.sync_bn")
    accumulation = "compare"

    def __init__(self, config: Config, world: World, images: int):
        """
        Raises:
            ValueError: an unknown architecture.
        """
        super().__init__(config, world, images)
        self.encoder = Encoder(config.model)
        if config.model.sync_bn:
            sync_batch_norm(self.encoder, world.group)
        self.prototypes = nn.Linear(config.model.dim, config.swav.prototypes, bias=False)
        rows = config.swav.queue_size // world.size
        self.register_buffer(_QUEUE, torch.zeros(_LARGE, rows, config.model.dim), persistent=False)

    @classmethod
    def check(cls, config: Config, images: int, ranks: int) -> None:
        options, batch = config.swav, config.optim.batch_size
        if not 2 <= options.prototypes <= images:
            raise ValueError(
                f"--swav.prototypes {options.prototypes}: every prototype gets the same share of the {images} images; "
                f"use 2 to {images}, and best a few hundredths of that at most"
            )
        if batch < 2:
            raise ValueError(f"--optim.batch-size {batch} leaves nothing to be told apart by codes; use 2 or more")
        if options.queue_size % ranks:
            raise ValueError(
                f"--swav.queue-size {options.queue_size} does not divide among {ranks} ranks; use a multiple of {ranks}"
            )
        if 0 < options.queue_size < batch:
            raise ValueError(
                f"--swav.queue-size {options.queue_size} is smaller than --optim.batch-size {batch}; use {batch} or "
                "more, or 0 for no queue"
            )
        check_areas("--swav.small-areas", options.small_areas)
        if options.small_crops:
            size = small_side(config.data.size) if options.small_size is None else options.small_size
            check_crop_size("--swav.small-size", size, config)
            smallest = config.data.at(0).size
            # Crops as large as the large ones are encoded with them.
            if in_proportion(size, smallest, config.data.size) < smallest:
                together = rank_batch(config, 1 if config.model.sync_bn else ranks)
                check_single_images(config, together * options.small_crops, size=size, head=False)

    @classmethod
    def miniature(cls, config: Config) -> dict[str, Any]:
        # An epoch of frozen prototypes, as in the preset; no small crops, for digits have no parts to look at. By two
        # trials of 8 epochs: kNN rises from 0.57 to 0.85 without a queue, and to 0.87 with this one.
        return {
            "swav.prototypes": 100,
            "swav.frozen_steps": 78,
            "swav.queue_size": 512,
            "swav.queue_epoch": 2,
            "swav.small_crops": 0,
            "optim.lr": 1.0,
        }

    @property
    def views(self) -> tuple[View, ...]:
        """Two large crops, then the small ones."""
        large, options = view_of(self.config.data), self.config.swav
        small = multi_crop(large, options.small_crops, size=options.small_size, areas=options.small_areas)
        return (large,) * _LARGE + small

    def notes(self) -> list[str]:
        first, last = self._queued_from, self.config.epochs * self._steps
        if not self.config.swav.queue_size or first < last:
            return []
        return [f"the queue is never used: it is full at step {first}, and the run has {last}; see --swav.queue-epoch"]

    def warning(self, means: dict[str, float], step: int) -> str | None:
        """A collapse: the encoder makes the same of all images, and codes mean nothing."""
        found, optim = means.get("spread", 1.0), self.config.optim
        if found >= COLLAPSED:
            return None
        return (
            f"the embeddings of different images are nearly the same (cosine similarity {1 - found:.3f} on average): "
            "they have collapsed, and their codes mean nothing. If the images do differ, start again with a lower "
            f"learning rate (--optim.lr {optim.lr:g}), a warm-up (--optim.warmup-epochs {optim.warmup_epochs}), fewer "
            f"prototypes (--swav.prototypes {self.config.swav.prototypes}) or a smaller --swav.epsilon "
            f"({self.config.swav.epsilon:g})"
        )

    # --- a step ---------------------------------------------------------------------------------------------------

    @property
    def _steps(self) -> int:
        """Of an epoch."""
        return self.images // self.config.optim.batch_size

    @property
    def _queued_from(self) -> int:
        """The first step that uses the queue, which is then full of steps since the start of its epoch."""
        options = self.config.swav
        return options.queue_epoch * self._steps + -(-options.queue_size // self.config.optim.batch_size)

    def draw(self, batch: Batch, number: int) -> dict[str, torch.Tensor | int]:
        """Nothing is drawn: the name says whether the queue is used. A step with other names is captured anew."""
        used = self.config.swav.queue_size > 0 and number >= self._queued_from
        return {_QUEUE: 1} if used else {}

    def represent(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """The embeddings of all crops, [N, crops, dim]."""
        return (self.embed(inputs.views).transpose(0, 1),)

    def compare(self, made: tuple[torch.Tensor, ...], inputs: Inputs) -> Step:
        self._normalise_prototypes()
        embeddings = made[0].transpose(0, 1)
        # In float32: epsilon and tau make much of a rounded score.
        with torch.autocast(embeddings.device.type, enabled=False):
            scores = embeddings @ self.prototypes.weight.T
        codes = self._codes(scores.detach(), queued=_QUEUE in inputs.drawn)
        loss = swapped_prediction(scores, codes, self.config.loss.temperature).mean()
        embeddings, scores = embeddings.detach(), scores.detach()
        metrics = {"loss": loss.detach(), "accuracy": _accuracy(scores, codes)}
        if (found := spread(embeddings[0])) is not None:
            metrics["spread"] = found
        return Step(loss, metrics, embeddings[:_LARGE])

    def embed(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """Unit embeddings [crops, N, dim], float32 or better. The backbone takes crops of one size at a time, as it
        must, the head all together: batch norm's statistics in it are of all crops.
        """
        pooled = torch.cat(self.encode_by_size(self.encoder.backbone, views))
        with autocast(pooled.device):
            projected = self.encoder.head(pooled)
        projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
        return F.normalize(projected, dim=1).view(len(views), len(views[0]), -1)

    @torch.no_grad()
    def _normalise_prototypes(self) -> None:
        """In place, so that the gradient knows nothing of it."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    @torch.no_grad()
    def _codes(self, scores: torch.Tensor, *, queued: bool) -> torch.Tensor:
        """The codes [2, N, K] of the large crops; each crop's are made by themselves.

        queued: whether with the queue, by the prototypes of now.
        """
        options, images = self.config.swav, scores.shape[1]
        found = []
        for own, former in zip(scores[:_LARGE], self.queue, strict=True):
            if queued:
                own = torch.cat([former @ self.prototypes.weight.T, own])
            codes = sinkhorn(own, epsilon=options.epsilon, iterations=options.iterations, group=self.world.group)
            found.append(codes[-images:])
        return torch.stack(found)

    def before_update(self, number: int) -> None:
        if number < self.config.swav.frozen_steps:
            self.prototypes.weight.grad = None

    def phase(self, number: int) -> bool:
        """Whether prototypes are frozen."""
        return number < self.config.swav.frozen_steps

    def after_update(self, carry: torch.Tensor, applied: torch.Tensor) -> None:
        """The queue takes this rank's embeddings, whether or not the update was applied: they are good embeddings."""
        rows = self.queue.shape[1]
        if rows:
            self.queue.copy_(torch.cat([carry, self.queue], dim=1)[:, :rows])

    def encoders(self) -> dict[str, nn.Module]:
        return {"query": self.encoder}

    # --- what is one rank's own -----------------------------------------------------------------------------------

    def own_state(self) -> dict[str, torch.Tensor]:
        """Beside batch norm's statistics, this rank's part of the queue."""
        return {**super().own_state(), _QUEUE: self.queue.cpu()}

    def load_own(self, states: Sequence[dict[str, torch.Tensor]]) -> None:
        """With another number of ranks the queue is dealt out anew, by age: nothing of it is lost."""
        super().load_own(states)
        # [crops, rows, ranks, dim]: by age, and of one age by rank.
        saved = torch.stack([state[_QUEUE] for state in states], dim=2).flatten(1, 2)
        mine = saved[:, self.world.rank :: self.world.size]
        if mine.shape != self.queue.shape:
            raise ValueError(
                f"the checkpoint's queue has {saved.shape[1]} embeddings of {saved.shape[2]} numbers for each crop, "
                f"and {self.world.size} ranks with --swav.queue-size {self.config.swav.queue_size} take "
                f"{self.queue.shape[1] * self.world.size} of {self.queue.shape[2]}"
            )
        self.queue.copy_(mine)


def _accuracy(scores: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """How many large crops have the highest score for the prototype that the other's code says, in percent."""
    return 100 * (scores[:_LARGE].argmax(2) == codes.flip(0).argmax(2)).float().mean()
