"""Batches, which loaders hand to the training step, and how the step normalises their images."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pcl_fast.kernels import switches
from pcl_fast.kernels.normalise import normalise as _normalise
from pcl_fast.kernels.normalise_plain import normalise as _normalise_plain

# ImageNet's channel means and deviations, in units of a byte.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class Batch(NamedTuple):
    """A batch holds the views of N images, finished but for `normalise`: bytes, which are quick to move.

    views: a tensor for every View that the loader was given, in its order: uint8 [N, size, size, 3] with the View's
        size, on the encoder's device.
    index: int64 [N], positions in the data set, on the CPU.
    """

    views: tuple[torch.Tensor, ...]
    index: torch.Tensor


def normalise(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return (image - mean) / std with ImageNet's means and deviations of the channels.

    Args:
        images: uint8 [N, H, W, 3].
        dtype: the result's: float16, bfloat16 or float32.

    Returns:
        [N, 3, H, W] in channels_last, on the images' device: what an encoder takes.

    Raises:
        ValueError: a shape or type is wrong.
    """
    run = _normalise if images.is_cuda and not switches.is_off("normalise") else _normalise_plain
    return run(images, mean=MEAN, std=STD, dtype=dtype)
