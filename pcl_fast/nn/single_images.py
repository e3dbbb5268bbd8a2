"""Whether batch norm can do with one image at a time: said before a run begins, by the flags that make it so."""

from __future__ import annotations

from dataclasses import replace

import torch

from pcl_fast.config import Config
from pcl_fast.crop_sizes import epoch_sides
from pcl_fast.nn.encoder import Encoder


def check_single_images(config: Config, rows: int) -> None:
    """Refuse encoders in which batch norm would take the variance of a single value. A method whose networks encode one
    view at a time calls it in its `check`.

    Of one image batch norm has as many values of a channel as a map has pixels. It is found out by a pass on the meta
    device whether a map of the smallest crops has but one, or the head has batch norm.

    Args:
        rows: images that batch norm has at a time: those that a rank encodes together, or a part of them by
            --model.bn-splits. More than one are enough, and nothing is looked at.

    Raises:
        ValueError: names the flags.
    """
    if rows > 1:
        return
    side = epoch_sides(config.data.sizes, config.data.size, [config.data.size])[0]
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        encoder = Encoder(replace(config.model, bn_splits=1)).train()
        try:
            encoder(torch.empty(1, 3, side, side))
        except RuntimeError:
            return  # as some of timm's do on this device, whatever the number of images
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(_refusal(config, side)) from error


def _refusal(config: Config, side: int) -> str:
    batch, splits, parts = config.optim.batch_size, config.model.bn_splits, config.optim.accumulate
    fewer = [f"fewer --model.bn-splits than {splits}"] * (splits > 1)
    fewer += [f"fewer parts than --optim.accumulate {parts}"] * (parts > 1)
    return (
        f"--optim.batch-size {batch} leaves batch norm one image at a time, of which --model.arch {config.model.arch} "
        f"with --model.head {config.model.head} has, at {side} px, a single value in some channels, and one value has "
        f"no variance; use {' or '.join([f'--optim.batch-size {2 * batch}', *fewer])}"
    )
