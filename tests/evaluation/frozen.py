"""Small frozen encoders, and what a task of evaluation works with, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from pcl_fast.config import DataConfig, ModelConfig
from pcl_fast.distributed import World
from pcl_fast.evaluation.continuation import Continuation
from pcl_fast.evaluation.tasks import Context
from pcl_fast.nn.encoder import Encoder
from pcl_fast.pretrained import Pretrained
from pcl_fast.run.signals import StopSignals

DATA = DataConfig(size=16, resize=20, workers=0, loader="torchvision", views="v1")


def pretrained(data: DataConfig | None = DATA) -> Pretrained:
    """Return a random ResNet-8 of 64 features, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(ModelConfig(arch="cifar_resnet8", dim=8)).eval()
    return Pretrained(
        encoder.backbone,
        encoder.head,
        64,
        "cifar_resnet8",
        False,
        "query",
        "random",
        Path("none"),
        "none",
        data,
        (),
        {},
    )


def continuation(folder: Path, world: World) -> Continuation:
    return Continuation(folder / "part.pt", {"a": 1}, StopSignals(), world)


def context(folder: Path, world: World, of: Pretrained | None = None) -> Context:
    of = of or pretrained()
    return Context(world, of, lambda path, encoder: of, folder, continuation(folder, world), Console(quiet=True))
