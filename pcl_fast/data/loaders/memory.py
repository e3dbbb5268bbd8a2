"""Which files shall stay in the machine's memory where not all of them fit: the cache's, or the images'."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from pcl_fast.config import DataConfig
from pcl_fast.data.sources.images import ImageSet
from pcl_fast.distributed import World

# So many images tell how large the files are.
_SAMPLED = 64
# Where a container's limit is said, in control groups of version 2 and 1.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def leave_room(images: ImageSet, config: DataConfig, world: World) -> ImageSet:
    """Return the same images, which give way in memory to this machine's part of the cache where that alone would fit.

    Both are read once an epoch, the cache as fast as the encoder can take it. The system drops what was not read for
    longest: where memory is too small for both, that is always what comes next.

    Raises:
        ImageError: one of the images by which the size of all is estimated cannot be read.
    """
    if config.cache is None:
        return images
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cache = len(images) * 3 * config.size**2 * ranks // world.size
    sampled = np.linspace(0, len(images) - 1, min(len(images), _SAMPLED)).astype(int).tolist()
    files = len(images) * sum(len(images.encoded(index)) for index in sampled) // len(sampled)
    return replace(images, kept=False) if cache < memory_bytes() < cache + files else images


def memory_bytes() -> int:
    """Return this machine's memory, or as much of it as its container may use."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMITS:
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # of another version, or "max"
            continue
    return min(limits)
