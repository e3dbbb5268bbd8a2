"""The loaders, which make the views of PCL v2 from photographs of ImageNet's size, and the time that a step loses by
waiting for them. Run by `make bench`.

All providers do the same work: from the same images and random numbers they make two views of 224 px (or one clustering
view) per image, which they decode once. The views end on the encoder's device (dali-cpu leaves them on the CPU of a
machine with a GPU). Multi-crop, as SwAV has it, makes six more views of 96 px from the same decoding; its
share_of_two_views is its images/s by those of the two views alone, of the same loader in the same run.

A round takes batches out of an endless stream, whose stages stay filled; a round of clustering views takes all images
once. Files are in the operating system's cache. "dali, cached" reads the clustering views from --data.cache, in a pass
of its own every round. That file is in the operating system's cache too, so the speed of the disk is not measured.

The step is PCL v2: on a GPU with ResNet-50 at 224 px and the paper's queue and prototypes, on a CPU with ResNet-18 at
64 px, whose views are measured by themselves too. It runs first with one batch that is on the device already, then with
each loader. There are fewer images than in the paper, and the prototypes are random; neither changes how long a step
takes.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import device
import optional
import photos
import pytest
import recipe
import torch

from pcl_fast.augmentations import View, multi_crop
from pcl_fast.config import Config, view_of
from pcl_fast.data import Batch, clustering_loader, training_loader
from pcl_fast.distributed import World

BATCH, STEPS, ROUNDS = (256, 8, 10) if device.CUDA else (64, 4, 9)
PASS = recipe.IMAGES // BATCH
LOADERS = ("torchvision", "dali", "dali-cpu") if device.CUDA else ("torchvision", "dali")
SIZES = {"images": recipe.IMAGES, "batch": BATCH, "width": photos.WIDTH, "height": photos.HEIGHT}
AT_HAND, CACHED = "batch at hand", "dali, cached"
# On a CPU the step's views are smaller than those of the loaders' benchmark.
OF_STEP = f"training views, {recipe.step_recipe(BATCH).data.size} px"
TWO, MULTI_CROP = "training views", "multi-crop, 2 x 224 and 6 x 96 px"
VIEWS = (TWO, MULTI_CROP, "clustering views", *([] if device.CUDA else [OF_STEP]))
# SwAV's shares of the image, of its large crops and of its small ones.
LARGE_AREAS, SMALL_AREAS, SMALL_CROPS = (0.14, 1.0), (0.05, 0.14), 6

pytestmark = pytest.mark.benchmark(timer=device.clock)


def config_of(loader: str, *, step: bool = False) -> Config:
    config = recipe.step_recipe if step else recipe.pcl_v2
    return config(BATCH, loader.removesuffix("-cpu"))


def world_of(loader: str) -> World:
    """Return the loader's world: dali-cpu decodes on the CPU even if there is a GPU."""
    return replace(recipe.WORLD, device=torch.device("cpu")) if loader == "dali-cpu" else recipe.WORLD


def views_of(config: Config, *, small: bool) -> tuple[View, ...]:
    """Return two views, or those of multi-crop."""
    view = view_of(config.data)
    if not small:
        return (view,) * 2
    large = replace(view, min_area=LARGE_AREAS[0], max_area=LARGE_AREAS[1])
    return (large, large, *multi_crop(large, SMALL_CROPS, areas=SMALL_AREAS))


def training_stream(loader: str, *, step: bool = False, small: bool = False) -> Iterator[Batch]:
    optional_loader(loader)
    config, world = config_of(loader, step=step), world_of(loader)
    views = views_of(config, small=small)
    batches = training_loader(recipe.folder()[0], config.data, views=views, batch_size=BATCH, seed=0, world=world)
    return itertools.chain.from_iterable(batches.epoch(epoch) for epoch in itertools.count())


def clustering_stream(loader: str, cache: Path | None = None) -> Iterator[torch.Tensor]:
    optional_loader(loader)
    config = replace(config_of(loader).data, cache=cache)
    batches = clustering_loader(recipe.folder()[0], config, batch_size=BATCH, world=world_of(loader))
    return itertools.chain.from_iterable(itertools.repeat(batches))


def optional_loader(loader: str) -> None:
    """Skip the test if DALI is needed and not installed."""
    if loader.startswith("dali"):
        optional.module("nvidia.dali", "nvidia-dali-cuda130")


def take(stream: Iterable, batches: int) -> None:
    for _ in itertools.islice(stream, batches):
        pass


rates: dict[tuple[str, str], float] = {}  # (views, loader) -> images/s


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("views", VIEWS)
def test_loader(benchmark, views, loader):
    if views == "clustering views":
        stream, steps = clustering_stream(loader), PASS
    else:
        stream, steps = training_stream(loader, step=views == OF_STEP, small=views == MULTI_CROP), STEPS
    take(stream, steps)
    measure(benchmark, views, loader, lambda: take(stream, steps), steps)
    if benchmark.enabled:
        rates[views, loader] = rate = benchmark.extra_info["figures"]["images_per_s"]
        if views == MULTI_CROP and (TWO, loader) in rates:
            benchmark.extra_info["figures"]["share_of_two_views"] = round(rate / rates[TWO, loader], 4)


def test_cached_clustering_views(benchmark, tmp_path):
    stream = clustering_stream("dali", tmp_path)
    take(stream, 2 * PASS)  # the first pass writes the cache
    measure(benchmark, "clustering views", CACHED, lambda: take(stream, PASS), PASS)


class Waiting:
    """An iterator over a stream's batches, which counts the seconds that the host waits for them."""

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

    learner = recipe.ready_learner(config_of(LOADERS[0], step=True))

    def steps() -> None:
        for number in range(STEPS):
            learner.step(next(stream), number)

    for _ in range(2):
        steps()
    torch.cuda.synchronize() if device.CUDA else None
    begin, stream.seconds = time.perf_counter(), 0.0
    measure(benchmark, f"step of {learner.config.model.arch}", loader, steps, STEPS)
    torch.cuda.synchronize() if device.CUDA else None
    share = stream.seconds / (time.perf_counter() - begin)
    benchmark.extra_info["figures"]["host_waits_share"] = round(share, 4)


def measure(benchmark, group: str, loader: str, work, steps: int) -> None:
    benchmark.group = group
    case = {"kilobytes_per_image": round(recipe.folder()[1], 1), "images_per_round": steps * BATCH}
    case["cores"] = len(os.sched_getaffinity(0))
    benchmark.extra_info.update(provider=loader, sizes=SIZES, versions=optional.versions(), case=case)
    benchmark.pedantic(work, rounds=ROUNDS)
    benchmark.extra_info["figures"] = {}
    if benchmark.enabled:
        rate = steps * BATCH / benchmark.stats.stats.median
        benchmark.extra_info["figures"]["images_per_s"] = round(rate, 1)
