"""Whether batch norm can do with one image at a time: said before a run begins, by the flags that make it so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from pcl_fast.config import Config
from pcl_fast.crop_sizes import epoch_sides
from pcl_fast.nn.encoder import Encoder


def check_single_images(config: Config, rows: int, *, size: int | None = None, head: bool = True) -> None:
    """Refuse encoders in which batch norm would take the variance of a single value. A method calls it in its `check`.

    Of one image batch norm has as many values of a channel as its map has pixels. Whether that is one, in a map of the
    smallest crops or in the head, a pass on the meta device finds out. What else is wrong with a network is said when
    it is built.

    Args:
        rows: images that batch norm has together: those that a rank encodes at a time, or a part of them by
            --model.bn-splits, or those of all ranks by --model.sync-bn. Two are enough, and nothing is looked at.
        size: the images' side in pixels, where crops have --data.size. None: --data.size.
        head: whether the head has no other images' features beside these.

    Raises:
        ValueError: names the flags.
    """
    if rows > 1:
        return
    data, model = config.data, config.model
    side = epoch_sides(data.sizes, data.size, [size or data.size])[0]
    if _has_single_values(lambda: Encoder(replace(model, bn_splits=1)).backbone, side):
        raise ValueError(_refusal(config, f"--model.arch {model.arch} has, at {side} px,", "larger crops"))
    if head and _has_single_values(lambda: Encoder(replace(model, bn_splits=1)), side):
        raise ValueError(_refusal(config, f"--model.head {model.head} has", "a --model.head without batch norm"))


def _has_single_values(build: Callable[[], nn.Module], side: int) -> bool:
    """Whether batch norm in a network refuses an image, tried on the meta device."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            build().train()(torch.empty(1, 3, side, side))
    except Exception as error:  # networks assert, index and reshape
        return "more than 1 value per channel" in str(error)
    return False


def _refusal(config: Config, has: str, other: str) -> str:
    batch, splits, parts = config.optim.batch_size, config.model.bn_splits, config.optim.accumulate
    ways = [f"--optim.batch-size {2 * batch}"]
    ways += [f"fewer --model.bn-splits than {splits}"] * (splits > 1)
    ways += [f"fewer parts than --optim.accumulate {parts}"] * (parts > 1)
    return (
        f"--optim.batch-size {batch} leaves a rank one image at a time for batch norm, of which {has} a single value "
        f"in some channels, and one value has no variance; use {', '.join(ways)} or {other}"
    )
