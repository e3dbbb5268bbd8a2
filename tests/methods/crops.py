"""A method of several crops of several sizes and nothing else: all crops of an image shall be near its large ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from pcl_fast.augmentations import View, multi_crop
from pcl_fast.config import Config
from pcl_fast.distributed import World
from pcl_fast.methods import Inputs, Method, Metric, Step
from pcl_fast.nn.encoder import Encoder

LARGE, SMALL = 2, 3


class Crops(Method, name="crops"):
    metrics: ClassVar = {"loss": Metric("distance", "loss")}

    def __init__(self, config: Config, world: World, images: int):
        super().__init__(config, world, images)
        self.encoder = Encoder(config.model)

    @property
    def views(self) -> tuple[View, ...]:
        large = super().views
        return (*large, *multi_crop(large[0], SMALL, areas=(0.05, 0.14)))

    def forward(self, inputs: Inputs) -> Step:
        features = torch.stack(self.encode_by_size(self.encoder, inputs.views))
        loss = 1 - (features[None] * features[:LARGE, None]).sum(3).mean()
        return Step(loss, {"loss": loss.detach()})

    def encoders(self) -> dict[str, nn.Module]:
        return {"query": self.encoder}
