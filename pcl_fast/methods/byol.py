"""BYOL (Grill et al., NeurIPS 2020): what a momentum encoder makes of one view is predicted from the other view.

Nothing is contrasted: there are neither negatives nor a queue, but a predictor, which the momentum encoder has not, and
a momentum that grows to 1. The recipe is that of a batch of 256 and 200 epochs; see docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from pcl_fast.augmentations import View
from pcl_fast.config import Config, view_of
from pcl_fast.data import Batch
from pcl_fast.distributed import World
from pcl_fast.losses import byol
from pcl_fast.methods.base import Inputs, Method, Metric, Step
from pcl_fast.methods.collapse import COLLAPSED, spread
from pcl_fast.nn.branch import branch
from pcl_fast.nn.encoder import Encoder, mlp_inner_bn
from pcl_fast.nn.momentum import GrowingMovingAverage, momentum_copy
from pcl_fast.nn.sync_batch_norm import sync_batch_norm
from pcl_fast.optim import Group, norms_and_biases_apart
from pcl_fast.schedule import rank_batch


class BYOL(Method, name="byol"):
    """An encoder, a predictor behind it, and a momentum encoder.

    In the paper they are the online network and the target network; the encoder's head is the projector.
    """

    metrics: ClassVar = {
        "loss": Metric("2 - 2 cos, sum of both ways", "loss"),
        "feature_spread": Metric("features of different images", "1 - cosine similarity"),
    }
    settings = ("model.momentum", "model.sync_bn")
    knows_its_end = True
    accumulation = "mean"

    def __init__(self, config: Config, world: World, images: int):
        """
        Raises:
            ValueError: an unknown architecture.
        """
        super().__init__(config, world, images)
        model = config.model
        self.encoder = Encoder(model)
        self.predictor = mlp_inner_bn(model.dim, model.hidden or self.encoder.width, model.dim, bias=False)
        self.momentum_encoder = momentum_copy(self.encoder)
        if model.sync_bn:
            sync_batch_norm(self, world.group)
        steps = config.epochs * max(1, images // config.optim.batch_size)
        self.average = GrowingMovingAverage(self.momentum_encoder, self.encoder, model.momentum, steps)

    @classmethod
    def check(cls, config: Config, images: int, ranks: int) -> None:
        if rank_batch(config, 1 if config.model.sync_bn else ranks) < 2:
            raise ValueError(
                f"--optim.batch-size {config.optim.batch_size} leaves batch norm an image by itself, and nothing else "
                f"keeps {cls.name} from making the same of all images; use {2 if config.model.sync_bn else 2 * ranks} "
                "or more"
            )

    @classmethod
    def miniature(cls, config: Config) -> dict[str, Any]:
        # By trials, see docs/methods.md; the widths were not tried.
        return {
            "model.dim": 128,
            "model.hidden": 256,
            "model.momentum": 0.9,
            "optim.lr": 6.0,
            "optim.warmup_epochs": 2,
        }

    @property
    def views(self) -> tuple[View, ...]:
        """Of BYOL's augmentation the second view is hardly ever blurred, and may be solarised; of others both views are
        drawn alike.
        """
        first = view_of(self.config.data)
        if self.config.data.views != self.name:
            return first, first
        return first, replace(first, blur_share=0.1, solarise_share=0.2)

    def groups(self) -> list[Group]:
        return norms_and_biases_apart(self)

    def warning(self, means: dict[str, float], step: int) -> str | None:
        """A collapse, which this method's loss does not tell from success."""
        found = means.get("feature_spread", 1.0)
        if found >= COLLAPSED:
            return None
        model, optim = self.config.model, self.config.optim
        return (
            f"the features of different images are nearly the same (cosine similarity {1 - found:.3f} on average): "
            "they have collapsed, and a low loss means nothing. If the images do differ, start again with a lower "
            f"learning rate (--optim.lr {optim.lr:g}), less weight decay (--optim.weight-decay {optim.weight_decay:g}) "
            f"or a slower momentum encoder (--model.momentum {model.momentum:g}, nearer to 1)"
        )

    def draw(self, batch: Batch, number: int) -> dict[str, torch.Tensor | int]:
        """The step's number, from which its momentum follows."""
        return {"number": number}

    def forward(self, inputs: Inputs) -> Step:
        # In one pass of each network, as batch norm's statistics are of both views.
        views = torch.cat(inputs.views)
        with branch(lambda: self._targets(views), self.world.device) as targets:
            projection, prediction = self.encode(self._predict, views)
        # Each view's prediction beside the other view's target.
        loss = 2 * byol(prediction, targets().roll(len(inputs.index), 0)).mean()
        metrics = {"loss": loss.detach(), **_spread(projection[: len(inputs.index)])}
        return Step(loss, metrics, inputs.drawn["number"])

    @torch.no_grad()
    def _targets(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode(self.momentum_encoder.projected, images)

    def _predict(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        projection = self.encoder.projected(images)
        return projection.detach(), self.predictor(projection)

    def join(self, carries: Sequence[torch.Tensor | int]) -> torch.Tensor | int:
        """All parts have the step's number."""
        return carries[0]

    def after_update(self, carry: torch.Tensor | int, applied: torch.Tensor) -> None:
        self.average.update(carry, applied)

    def encoders(self) -> dict[str, nn.Module]:
        """Features for evaluation are the query encoder's, whose backbone the paper evaluates."""
        return {"query": self.encoder, "momentum": self.momentum_encoder}


def _spread(projection: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the projections [N, dim] of one view of a rank's images, if there are two."""
    found = spread(nn.functional.normalize(projection.float(), dim=1))
    return {} if found is None else {"feature_spread": found}
