"""The loaders: photographs of ImageNet's size into the views of PCL v2, and what the step loses by waiting for them.
Run by `make bench`.

All providers do the same work: the same images and random numbers, decoded once, two views of 224 px (or one clustering
view), on the encoder's device (dali-cpu leaves them on the CPU of a machine with a GPU).
Files are in the operating system's cache. A round takes batches out of an endless stream, whose stages stay filled.

The step is PCL v2: on a GPU with ResNet-50 at 224 px and the paper's queue and prototypes, on a CPU with ResNet-18 at
64 px; first with one batch that is there already, then with either loader. The images are fewer than the paper's, and
the prototypes random: neither changes how long a step takes.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import device
import optional
import photos
import pytest
import torch
import torch.nn.functional as F

from pcl_fast.clustering import PrototypeSet
from pcl_fast.config import PRESETS, Config
from pcl_fast.data import Batch, ImageFolder, clustering_loader, find_images, training_loader
from pcl_fast.distributed import World
from pcl_fast.learner import Learner

WORLD = World(0, 1, torch.device("cuda", 0) if device.CUDA else torch.device("cpu"), None)
IMAGES, BATCH, STEPS, ROUNDS = (4096, 256, 8, 10) if device.CUDA else (512, 64, 4, 9)
LOADERS = ("torchvision", "dali", "dali-cpu") if device.CUDA else ("torchvision", "dali")
SIZES = {"images": IMAGES, "batch": BATCH, "width": photos.WIDTH, "height": photos.HEIGHT}
AT_HAND = "batch at hand"

pytestmark = pytest.mark.benchmark(timer=device.clock)


@functools.cache
def folder() -> tuple[ImageFolder, float]:
    """The photographs, and the mean size of their files in KB."""
    root = tempfile.TemporaryDirectory(prefix="photographs-")
    folder.keep = root  # until the process ends
    size = photos.write_photographs(Path(root.name), IMAGES)
    return find_images(Path(root.name)), size / 1000


def recipe(loader: str, *, step: bool = False) -> Config:
    """PCL v2; for steps on a CPU as small as it would be used there."""
    config = PRESETS["pcl_v2"][1]
    data = replace(config.data, loader=loader.removesuffix("-cpu"))
    config = replace(config, data=data, optim=replace(config.optim, batch_size=BATCH))
    if device.CUDA or not step:
        return config
    return replace(
        config,
        data=replace(data, size=64, resize=73),
        model=replace(config.model, arch="resnet18", queue_size=4096),
        cluster=replace(config.cluster, ks=(100, 200)),
    )


def world_of(loader: str) -> World:
    """dali-cpu decodes on the CPU even where there is a GPU."""
    return replace(WORLD, device=torch.device("cpu")) if loader == "dali-cpu" else WORLD


def training_stream(loader: str, *, step: bool = False) -> Iterator[Batch]:
    optional_loader(loader)
    config, world = recipe(loader, step=step), world_of(loader)
    batches = training_loader(folder()[0], config.data, batch_size=BATCH, seed=0, world=world)
    return itertools.chain.from_iterable(batches.epoch(epoch) for epoch in itertools.count())


def clustering_stream(loader: str) -> Iterator[torch.Tensor]:
    optional_loader(loader)
    batches = clustering_loader(folder()[0], recipe(loader).data, batch_size=BATCH, world=world_of(loader))
    return itertools.chain.from_iterable(itertools.repeat(batches))


def optional_loader(loader: str) -> None:
    if loader.startswith("dali"):
        optional.module("nvidia.dali", "nvidia-dali-cuda130")


def take(stream: Iterable, batches: int) -> None:
    for _ in itertools.islice(stream, batches):
        pass


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("views", ["training", "clustering"])
def test_loader(benchmark, views, loader):
    stream = training_stream(loader) if views == "training" else clustering_stream(loader)
    take(stream, STEPS)
    measure(benchmark, f"{views} views", loader, lambda: take(stream, STEPS))


@functools.cache
def learner() -> Learner:
    return Learner(recipe(LOADERS[0], step=True), WORLD)


@functools.cache
def prototypes() -> list[PrototypeSet]:
    generator = torch.Generator(WORLD.device).manual_seed(0)
    options = {"generator": generator, "device": WORLD.device}
    config = learner().config
    return [
        PrototypeSet(
            F.normalize(torch.randn(k, config.model.dim, **options), dim=1),
            torch.full((k,), config.loss.temperature, device=WORLD.device),
            torch.randint(k, (IMAGES,), dtype=torch.int32, **options),
        )
        for k in config.cluster.ks
    ]


class Waiting:
    """Batches of a stream, and the seconds that the host waited for them."""

    def __init__(self, stream: Iterator[Batch]):
        self.stream, self.seconds = stream, 0.0

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        batch = next(self.stream)
        self.seconds += time.perf_counter() - begin
        return batch


@pytest.mark.parametrize("loader", [AT_HAND, *(loader for loader in LOADERS if loader != "dali-cpu")])
def test_step(benchmark, loader):
    if loader == AT_HAND:
        stream = Waiting(itertools.repeat(next(training_stream(LOADERS[0], step=True))))
    else:
        stream = Waiting(training_stream(loader, step=True))

    def steps() -> None:
        for number in range(STEPS):
            learner().step(next(stream), prototypes(), number)

    for _ in range(2):
        steps()
    torch.cuda.synchronize() if device.CUDA else None
    begin, stream.seconds = time.perf_counter(), 0.0
    measure(benchmark, f"step of {learner().config.model.arch}", loader, steps)
    torch.cuda.synchronize() if device.CUDA else None
    share = stream.seconds / (time.perf_counter() - begin)
    benchmark.extra_info["figures"]["host_waits_share"] = round(share, 4)


def measure(benchmark, group: str, loader: str, work) -> None:
    benchmark.group = group
    case = {"kilobytes_per_image": round(folder()[1], 1), "images_per_round": STEPS * BATCH}
    case["cores"] = len(os.sched_getaffinity(0))
    benchmark.extra_info.update(provider=loader, sizes=SIZES, versions=optional.versions(), case=case)
    benchmark.pedantic(work, rounds=ROUNDS)
    benchmark.extra_info["figures"] = {}
    if benchmark.enabled:
        rate = STEPS * BATCH / benchmark.stats.stats.median
        benchmark.extra_info["figures"]["images_per_s"] = round(rate, 1)
