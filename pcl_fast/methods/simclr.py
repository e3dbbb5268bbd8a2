"""SimCLR (Chen et al., ICML 2020): two views of an image against both views of all other images of the global batch.

There is no momentum encoder, no queue and no E-step. The recipe is that of a batch of 256 and 200 epochs; see
docs/methods.md.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pcl_fast.config import Config
from pcl_fast.distributed import World
from pcl_fast.losses import nt_xent
from pcl_fast.methods.base import Inputs, Method, Metric, Step
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.sync_batch_norm import sync_batch_norm
from pcl_fast.optim import Group, norms_and_biases_apart


class SimCLR(Method, name="simclr"):
    """An encoder, and nothing beside it."""

    metrics: ClassVar = {
        "loss": Metric("NT-Xent", "loss"),
        "similarity": Metric("two views of an image", "cosine similarity"),
    }
    settings = ("loss.temperature", "model.sync_bn")
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

    @classmethod
    def check(cls, config: Config, images: int, ranks: int) -> None:
        if config.optim.batch_size < 2:
            raise ValueError(
                f"--optim.batch-size {config.optim.batch_size} leaves an image nothing to be contrasted with; use 2 or "
                "more"
            )

    @classmethod
    def miniature(cls, config: Config) -> dict[str, Any]:
        # By a trial of this rate and of the preset's; a batch of 64 learns too slowly at that.
        return {"optim.lr": 1.0, "optim.warmup_epochs": 2}

    def groups(self) -> list[Group]:
        return norms_and_biases_apart(self)

    def represent(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """The features of both views, [N, 2, dim]."""
        # In one pass, as batch norm's statistics are of both views.
        features = self.encode(self.encoder, torch.cat(inputs.views))
        return (features.unflatten(0, (2, -1)).transpose(0, 1),)

    def compare(self, made: tuple[torch.Tensor, ...], inputs: Inputs) -> Step:
        a, b = made[0].unbind(1)
        loss = nt_xent(a, b, self.config.loss.temperature, group=self.world.group).mean()
        similarity = (a * b).sum(1).detach().mean()
        return Step(loss, {"loss": loss.detach(), "similarity": similarity})

    def encoders(self) -> dict[str, nn.Module]:
        return {"query": self.encoder}
