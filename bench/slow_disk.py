"""The clustering view from --data.cache on a slow disk, while idle cores decode a part of it. Run by `make bench`.

The disk is made slow: whoever reads waits until it would have given the bytes. It is so many times as fast as the cores
decode, which is measured first. The providers are:

- cores: DALI decodes all images.
- disk: all of them are read.
- disk and cores: as in a run; share_of_sum is its speed by the sum of the speeds of the two others in the same run.

A round takes batches in the midst of a pass over the photographs, each of which there is several times. That the cores
begin to help when the pass has waited for half a second is in no round: a pass over ImageNet takes minutes. Nobody
encodes the batches, so that the host has no more to do than to make them.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import device
import optional
import pytest
import recipe
import torch

from pcl_fast.data import clustering_loader, find_images
from pcl_fast.data.loaders import cache, feeds

TIMES = (1, 2, 4)  # as fast as the cores
BATCH, COPIES = 64, 10 if device.CUDA else 26
STEPS, ROUNDS = (128, 3) if device.CUDA else (96, 3)  # batches
# Until cores help, which they do when the pass has waited for half a second.
WARM_UP = 1.5  # seconds
CORES, DISK, BOTH = "cores", "disk", "disk and cores"
PROVIDERS = (CORES, DISK, BOTH)
SIZES = {"images": recipe.IMAGES * COPIES, "batch": BATCH}

pytestmark = pytest.mark.benchmark(timer=device.clock)


class SlowDisk:
    """A slow disk gives so many bytes a second to all who read from it together."""

    def __init__(self, rate: float):
        self.rate, self.lock, self.free = rate, threading.Lock(), 0.0
        self.read = cache._read_into

    def __call__(self, array, descriptor: int, offset: int) -> None:
        self.read(array, descriptor, offset)
        with self.lock:
            self.free = max(self.free, time.perf_counter()) + array.nbytes / self.rate
        time.sleep(max(0.0, self.free - time.perf_counter()))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder with every photograph several times, by links, and a whole cache of them."""
    folder = tmp_path_factory.mktemp("copies")
    photographs = recipe.folder()[0]
    for image in range(recipe.IMAGES):
        for copy in range(COPIES):
            (folder / f"{image:05d}-{copy:02d}.jpg").symlink_to(photographs.path(image))
    for _ in loader_of(folder, cached=True):
        pass
    return folder


def loader_of(folder: Path, *, cached: bool) -> Iterable[torch.Tensor]:
    config = replace(recipe.pcl_v2(BATCH, "dali").data, cache=folder.with_name("cache") if cached else None)
    return clustering_loader(find_images(folder), config, batch_size=BATCH, world=recipe.WORLD)


class Passes:
    """Passes over the images, of each of which some batches in the midst are taken."""

    def __init__(self, loader: Iterable[torch.Tensor]):
        self.loader, self.batches = loader, iter(())
        self.seconds: list[float] = []

    def begin(self) -> None:
        self.end()
        self.batches = iter(self.loader)
        until = time.perf_counter() + WARM_UP
        while time.perf_counter() < until:
            next(self.batches)

    def take(self) -> None:
        begin = time.perf_counter()
        for _ in itertools.islice(self.batches, STEPS):
            pass
        self.seconds.append(time.perf_counter() - begin)

    def end(self) -> None:
        if hasattr(self.batches, "close"):
            self.batches.close()


rates: dict[str, float] = {}  # provider -> images/s, of the case that is being measured


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("times", TIMES)
def test_slow_disk(benchmark, monkeypatch, root, times, provider):
    optional.module("nvidia.dali", "nvidia-dali-cuda130")
    if provider != CORES:
        image_bytes = 3 * recipe.pcl_v2(BATCH).data.size ** 2
        monkeypatch.setattr(cache, "_read_into", SlowDisk(times * rates[CORES] * image_bytes))
    if provider == DISK:
        monkeypatch.setattr(feeds, "_PATIENCE", math.inf)
    passes = Passes(loader_of(root, cached=provider != CORES))
    benchmark.group = f"disk {times} times as fast as the cores"
    case = {"images_per_round": STEPS * BATCH, "cores": len(os.sched_getaffinity(0))}
    benchmark.extra_info.update(provider=provider, sizes=SIZES, versions=optional.versions(), case=case)
    benchmark.pedantic(passes.take, setup=passes.begin, rounds=ROUNDS)
    passes.end()
    rates[provider] = rate = STEPS * BATCH / statistics.median(passes.seconds)
    benchmark.extra_info["figures"] = {"images_per_s": round(rate, 1)}
    if provider == BOTH:
        benchmark.extra_info["figures"]["share_of_sum"] = round(rate / (rates[CORES] + rates[DISK]), 4)
