"""Images whose class is their colour, an encoder that knows nothing of them, and what a task of evaluation needs."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from pcl_fast.config import DataConfig, to_dict
from pcl_fast.distributed import World
from pcl_fast.evaluation.continuation import Continuation
from pcl_fast.evaluation.tasks import Context, Task
from pcl_fast.nn.encoder import Encoder
from pcl_fast.pretrained import Pretrained, read_pretrained
from pcl_fast.run.checkpoint import save_checkpoint
from pcl_fast.run.signals import StopSignals

CLASSES = 10
READING = DataConfig(loader="torchvision", workers=0, views="crop", min_crop_area=0.2, size=16, resize=16)


def write_coloured(root: Path, *, per_class: int, seed: int) -> Path:
    """PNGs of 16 px, root/NUMBER/NUMBER_IMAGE.png: a colour and much noise."""
    rng = np.random.default_rng(seed)
    for label in range(CLASSES):
        (root / str(label)).mkdir(parents=True)
        colour = 40 + 175 * np.array(colorsys.hsv_to_rgb(label / CLASSES, 1, 1))
        for number in range(per_class):
            pixels = (colour + rng.normal(0, 30, (16, 16, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{label}_{number}.png")
    return root


def write_labelled(folder: Path, *, per_class: int = 20) -> Path:
    """folder/train and folder/val."""
    write_coloured(folder / "train", per_class=per_class, seed=0)
    write_coloured(folder / "val", per_class=10, seed=1)
    return folder


def write_checkpoint(folder: Path) -> Path:
    """A run of the demo's that has learned nothing yet."""
    from steps import small_config

    config = small_config()
    torch.manual_seed(0)
    encoders = {name: Encoder(config.model).state_dict() for name in ("query", "momentum")}
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, {"epoch": 1, "config": to_dict(config), "encoders": encoders})
    return folder


def context_of(world: World, task: Task, signals: StopSignals | None = None) -> Context:
    """As the command makes it, but for what it prints."""

    def read(path: Path, encoder: str) -> Pretrained:
        return read_pretrained(path, encoder).to(world.device)

    pretrained = read(task.checkpoint, task.encoder or task.scores)
    task.output.mkdir(parents=True, exist_ok=True)
    part = Continuation(task.output / f"{task.name}.part.pt", task.settings(), signals or StopSignals(), world)
    return Context(world, pretrained, read, task.output, part, Console(quiet=True))
