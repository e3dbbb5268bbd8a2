"""Augmentations: from one decoded image to the two training views, or to the clustering view.

All of them return uint8 tensors [3, size, size]; `normalise` turns a batch into what the encoder wants on the
encoder's own device, so that only bytes travel from the loader to the GPU and between ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from pcl_fast.config import DataConfig

View = Callable[[Image.Image], torch.Tensor]

# ImageNet's channel means and deviations, in units of a byte.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


def training_view(config: DataConfig) -> View:
    """One random view. Calling it twice gives the two views of an image.

    v1 and v2 are the paper's (and MoCo's) recipes, operation for operation. digits is for grey handwriting that fills
    its image, where colour means nothing and a flip or a crop changes the class: a slight affine distortion instead.
    """
    crop = v2.RandomResizedCrop(config.size, scale=(config.min_crop_area, 1.0), antialias=True)
    recipes: dict[str, list[Callable]] = {
        "v1": [
            crop,
            v2.RandomGrayscale(0.2),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.4),
            v2.RandomHorizontalFlip(),
        ],
        "v2": [
            crop,
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([GaussianBlur(0.1, 2.0)], p=0.5),
            v2.RandomHorizontalFlip(),
        ],
        "digits": [
            v2.RandomAffine(
                20, translate=(0.1, 0.1), scale=(0.9, 1.3), shear=20, interpolation=v2.InterpolationMode.BILINEAR
            ),
            v2.RandomApply([GaussianBlur(0.1, 1.5)], p=0.5),
            v2.Resize((config.size, config.size), antialias=True),
        ],
    }
    return v2.Compose([*recipes[config.views], to_bytes])


class GaussianBlur(torch.nn.Module):
    """PIL's blur with a standard deviation drawn uniformly between two bounds, in pixels: what the official code uses.

    torchvision's own blur is another filter (23 taps, reflected borders) and many times slower on PIL images.
    """

    def __init__(self, least: float, most: float):
        super().__init__()
        self.bounds = (least, most)

    def forward(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(*self.bounds).item()))

    def extra_repr(self) -> str:
        return "sigma={}..{}".format(*self.bounds)


def clustering_view(config: DataConfig) -> View:
    """The whole training set is clustered on plain centre crops."""
    return v2.Compose([v2.Resize(config.resize, antialias=True), v2.CenterCrop(config.size), to_bytes])


def to_bytes(image: Image.Image) -> torch.Tensor:
    """RGB image -> uint8 [3, H, W]. v2.PILToTensor takes four times as long (0.1 ms), which tells for small images."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 views [N, 3, H, W] -> float32 with ImageNet's mean and deviation, channels_last."""
    mean, scale = _statistics(images.device)
    return ((images.float() - mean) / scale).contiguous(memory_format=torch.channels_last)


@functools.cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [1, 3, 1, 1], kept: copying them from the host at every step would wait for the device."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
