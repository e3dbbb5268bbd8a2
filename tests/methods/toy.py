"""A method that nobody would want, made of what other methods will need: a bank of its own on every rank, a head that
is frozen at first, views of three sizes, pairs of images, groups of parameters for LARS, and an E-step from the bank.

Run as a program it trains like pcl_fast.train, on a recipe of its own: toy.py DATA OUTPUT [STEP SIGNAL], which sends
itself the signal after that step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pcl_fast.augmentations import View
from pcl_fast.clustering import cluster_row
from pcl_fast.config import PRESETS, Config
from pcl_fast.data import Batch
from pcl_fast.distributed import World, all_reduce_sum, connect, disconnect
from pcl_fast.methods import FeatureSpec, Inputs, Method, Metric, Step
from pcl_fast.nn.encoder import Encoder
from pcl_fast.optim import Group, norms_and_biases_apart
from pcl_fast.run.metrics import StepMetrics
from pcl_fast.seeds import Purpose, mix_seeds
from pcl_fast.train import run

CLUSTERS = 4
FROZEN_STEPS = 5


class Toy(Method, name="toy"):
    metrics: ClassVar = {"loss": Metric("sum", "loss"), "agreement": Metric("with pseudo-labels", "agreement, %")}
    settings = ("loss.temperature",)

    def __init__(self, config: Config, world: World, images: int):
        super().__init__(config, world, images)
        self.encoder = Encoder(config.model)
        self.head = nn.Linear(config.model.dim, CLUSTERS, bias=False)
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64))
        # Of the images that this rank has seen; nobody else's business.
        self.register_buffer("bank", torch.zeros(images, config.model.dim), persistent=False)
        self.register_buffer("seen", torch.zeros(images, dtype=torch.bool), persistent=False)

    @property
    def views(self) -> tuple[View, ...]:
        return tuple(View(size=size, min_area=area, flip_share=0.5) for size, area in ((20, 0.5), (16, 0.3), (12, 0.1)))

    def groups(self) -> list[Group]:
        head = Group([self.head.weight], lr_scale=2.0, decay=False, adapt=False)
        return [*norms_and_biases_apart(self.encoder), head]

    def order(self, epoch: int) -> np.ndarray:
        """Pairs: after each image of the first half comes, on the same rank, its partner in the second half."""
        half, ranks = self.images // 2, self.world.size
        generator = torch.Generator().manual_seed(mix_seeds(self.config.seed, Purpose.ORDER, epoch))
        first = torch.randperm(half, generator=generator)[: half // ranks * ranks].view(-1, ranks)
        # A pair for every rank, to which the images are dealt out.
        return torch.stack([first, first + half], dim=1).flatten().numpy()

    def draw(self, batch: Batch, number: int) -> dict[str, torch.Tensor | int]:
        first, second = batch.index.view(-1, 2).T
        assert torch.equal(second, first + self.images // 2), "the batch is not of pairs"
        generator = torch.Generator().manual_seed(mix_seeds(self.config.seed, number, self.world.rank))
        return {"seed": number, "noise": torch.randint(100, (len(batch.index), 2), generator=generator)}

    def forward(self, inputs: Inputs) -> Step:
        large, middle, little = (self.encode(self.encoder, view) for view in inputs.views)
        near = 2 - (large * middle).sum(1) - (large * little).sum(1)
        scores = self.head(large) + inputs.drawn["noise"].sum(1, keepdim=True) * 1e-3
        labels = self.labels[inputs.index]
        loss = near.mean() + F.cross_entropy(scores / self.config.loss.temperature, labels)
        agreement = 100 * (scores.argmax(1) == labels).float().mean()
        return Step(loss, {"loss": loss.detach(), "agreement": agreement}, (inputs.index, large.detach()))

    def before_update(self, number: int) -> None:
        if number < FROZEN_STEPS:
            self.head.weight.grad = None

    def after_update(self, carry: tuple[torch.Tensor, torch.Tensor], applied: torch.Tensor) -> None:
        index, features = carry
        self.bank[index] = features
        self.seen[index] = True

    def encoders(self) -> dict[str, nn.Module]:
        return {"query": self.encoder}

    def features(self) -> FeatureSpec:
        return FeatureSpec("query", self.config.model.dim, from_bank=True)

    def expects(self, epoch: int) -> bool:
        return epoch > 0

    def expect(self, features: torch.Tensor | None, epoch: int) -> list[dict[str, Any]]:
        assert features is None
        whole = all_reduce_sum(self.bank * self.seen[:, None], self.world.group)
        self.labels.copy_((whole @ self.head.weight.T).argmax(1))
        return [cluster_row(CLUSTERS, self.labels)]

    def clusterings(self) -> dict[str, torch.Tensor]:
        return {f"{CLUSTERS}": self.labels}

    def own_state(self) -> dict[str, torch.Tensor]:
        return {**super().own_state(), "bank": self.bank.cpu(), "seen": self.seen.cpu()}

    def load_own(self, states: Sequence[dict[str, torch.Tensor]]) -> None:
        if len(states) != self.world.size:
            raise ValueError(
                f"the banks of {len(states)} ranks cannot be taken up by {self.world.size}; go on with {len(states)}"
            )
        super().load_own(states)
        self.bank.copy_(states[self.world.rank]["bank"])
        self.seen.copy_(states[self.world.rank]["seen"])


def recipe(data: Path, output: Path) -> Config:
    config = PRESETS["demo"][1]
    return replace(
        config,
        preset="toy",
        method="toy",
        output=output,
        epochs=3,
        log_every=1,
        data=replace(config.data, root=data),
        model=replace(config.model, dim=16),
        cluster=replace(config.cluster, ks=()),
        optim=replace(config.optim, optimizer="lars", lr=0.5, batch_size=12, warmup_epochs=1, weight_decay=1e-3),
        evaluation=replace(config.evaluation, every=1, neighbours=5),
    )


def signal_after(step: int, number: int) -> None:
    """Send a signal to this process when it has done so many steps."""
    add = StepMetrics.add

    def signalling(self: StepMetrics, reached: int, *arguments: Any) -> None:
        add(self, reached, *arguments)
        if reached == step:
            os.kill(os.getpid(), number)

    StepMetrics.add = signalling


if __name__ == "__main__":
    if len(sys.argv) > 3:
        signal_after(*map(int, sys.argv[3:]))
    world = connect()
    try:
        run(recipe(*map(Path, sys.argv[1:3])), world)
    except ValueError as error:
        sys.exit(str(error))
    disconnect(world)
