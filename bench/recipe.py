"""The recipe that the benchmarks of loaders and of the step train (PCL v2, for a GPU or a CPU), with photographs,
prototypes and a learner for it.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import device
import photos
import torch
import torch.nn.functional as F

from pcl_fast.clustering import PrototypeSet
from pcl_fast.config import PRESETS, Config
from pcl_fast.data import ImageFolder, find_images
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import build

WORLD = World(0, 1, torch.device("cuda", 0) if device.CUDA else torch.device("cpu"), None)
IMAGES = 4096 if device.CUDA else 512
# For the other methods' clusters, banks and negatives, of which their presets have thousands.
CLUSTERED = 20_000


@functools.cache
def folder() -> tuple[ImageFolder, float]:
    """Return the photographs, and the mean size of their files in KB."""
    root = tempfile.TemporaryDirectory(prefix="photographs-")
    folder.keep = root  # so that the files exist until the process ends
    size = photos.write_photographs(Path(root.name), IMAGES)
    return find_images(Path(root.name)), size / 1000


def pcl_v2(batch: int, loader: str = "auto") -> Config:
    """Return the recipe of PCL v2 with this batch size and loader."""
    config = PRESETS["pcl_v2"][1]
    return replace(config, data=replace(config.data, loader=loader), optim=replace(config.optim, batch_size=batch))


def step_recipe(batch: int, loader: str = "auto") -> Config:
    """Return the recipe of PCL v2; on a CPU, what would suit 100,000 images of 64 px."""
    config = pcl_v2(batch, loader)
    if device.CUDA:
        return config
    return replace(
        config,
        data=replace(config.data, size=64, resize=73),
        model=replace(config.model, arch="resnet18", queue_size=4096),
        cluster=replace(config.cluster, ks=(500, 1000, 2000)),
        loss=replace(config.loss, num_negatives=256),
    )


def method_recipe(method: str, batch: int) -> Config:
    """Return the recipe of another method's preset with this batch size; on a CPU for images of 64 px."""
    config = next(config for _, config in PRESETS.values() if config.method == method)
    config = replace(config, optim=replace(config.optim, batch_size=batch))
    if device.CUDA:
        return config
    return replace(config, data=replace(config.data, size=64, resize=73), model=replace(config.model, arch="resnet18"))


def random_prototypes(config: Config) -> list[PrototypeSet]:
    """Return prototypes of the photographs. They are random, which does not change how long a step takes."""
    options = {"generator": torch.Generator(WORLD.device).manual_seed(0), "device": WORLD.device}
    return [
        PrototypeSet(
            F.normalize(torch.randn(k, config.model.dim, **options), dim=1),
            torch.full((k,), config.loss.temperature, device=WORLD.device),
            torch.randint(k, (IMAGES,), dtype=torch.int32, **options),
        )
        for k in config.cluster.ks
    ]


def ready_learner(config: Config) -> Learner:
    """Return a learner with prototypes, as it is in the first epoch after an E-step."""
    learner = Learner(build(config, WORLD, IMAGES), config, WORLD)
    learner.method.prototypes.replace(random_prototypes(config))
    learner.set_rate(0)
    return learner


def ready_method(config: Config) -> Learner:
    """Return a learner of any method, after an E-step of one iteration, of random features, if there is any."""
    short = replace(config, cluster=replace(config.cluster, iterations=1, redo=1))
    learner = Learner(build(short, WORLD, CLUSTERED), short, WORLD)
    method = learner.method
    epoch = next((epoch for epoch in range(config.epochs) if method.expects(epoch)), None)
    if epoch is not None:
        generator = torch.Generator(WORLD.device).manual_seed(0)
        width = method.features().width
        features = torch.randn(CLUSTERED, width, generator=generator, device=WORLD.device)
        method.expect(F.normalize(features, dim=1), epoch)
    learner.set_rate(0)
    return learner
