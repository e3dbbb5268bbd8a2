"""Learners of a tiny PCL, and batches for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pcl_fast.clustering import PrototypeSet
from pcl_fast.config import PRESETS, Config
from pcl_fast.data import Batch
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import Method, build

DEMO = PRESETS["demo"][1]


def small_config(**changes) -> Config:
    config = replace(
        DEMO,
        model=replace(DEMO.model, queue_size=12, dim=8, arch="cifar_resnet8"),
        optim=replace(DEMO.optim, batch_size=6),
        cluster=replace(DEMO.cluster, ks=()),
    )
    return replace(config, **changes)


def learner_of(
    config: Config, world: World, prototypes: Sequence[PrototypeSet] = (), *, images: int | None = None
) -> Learner:
    """As after an E-step that found these prototypes, if there are any."""
    ks = tuple(len(granularity.centroids) for granularity in prototypes)
    config = replace(config, cluster=replace(config.cluster, ks=ks))
    if images is None:
        images = len(prototypes[0].assignment) if prototypes else 6
    learner = Learner(build(config, world, images), config, world)
    if prototypes:
        learner.method.prototypes.replace(prototypes)
    learner.set_rate(0)
    return learner


def batch(seed: int = 0, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(0, 256, (2, rows, 12, 12, 3), generator=generator, dtype=torch.uint8)
    return Batch((views[0], views[1]), torch.arange(rows))


def batch_for(method: Method, seed: int = 0, rows: int = 6) -> Batch:
    """Of the views that the method wants."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, view.size, view.size, 3) for view in method.views]
    views = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]
    return Batch(tuple(views), torch.arange(rows))


def part(whole: Batch, rows: slice, *, rolled: int = 0) -> Batch:
    """Some rows of a batch, which is rolled first."""
    views = tuple(view.roll(rolled, 0)[rows] for view in whole.views)
    return Batch(views, whole.index.roll(rolled, 0)[rows])


def weights(learner: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.method.encoder.parameters()]


def momenta(learner: Learner) -> list[torch.Tensor]:
    return [state["momentum_buffer"].clone() for state in learner.optimizer.state.values()]


def same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
