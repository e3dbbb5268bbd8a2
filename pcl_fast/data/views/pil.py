"""The views made with PIL and torchvision, to which those of DALI and the kernels are held."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as F

from pcl_fast.data.views.draws import Draws
from pcl_fast.kernels.photometric_plain import Op

# An image that is more than so many times as long as wide is extremely long.
_LONGEST = 64

_ADJUST = {
    Op.BRIGHTNESS: F.adjust_brightness,
    Op.CONTRAST: F.adjust_contrast,
    Op.SATURATION: F.adjust_saturation,
    Op.HUE: F.adjust_hue,
    Op.GRAYSCALE: lambda image, _: F.rgb_to_grayscale(image, num_output_channels=3),
}


def training_view(image: Image.Image, draws: Draws, row: int, size: int) -> torch.Tensor:
    """Make one random view of an RGB image: uint8 [size, size, 3].

    Args:
        draws: the random numbers of this view and perhaps of others.
        row: the place among them of this view's.
        size: side of the view, in pixels.
    """
    if draws.matrix is not None:
        image = image.transform(
            image.size, Image.Transform.AFFINE, draws.matrix[row].ravel().tolist(), Image.Resampling.BILINEAR
        )
    top, left, height, width = draws.window[row].tolist()
    image = F.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    for op, factor in zip(draws.ops[row].tolist(), draws.factors[row].tolist(), strict=True):
        if op != Op.NONE:
            image = _ADJUST[op](image, factor)
    if draws.sigma[row]:
        # The official code takes PIL's blur; torchvision's own is another filter (23 taps, reflected borders).
        image = image.filter(ImageFilter.GaussianBlur(float(draws.sigma[row])))
    if draws.solarise[row]:
        image = ImageOps.solarize(image, threshold=128)
    if draws.flip[row]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_bytes(image)


def clustering_view(image: Image.Image, resize: int, size: int) -> torch.Tensor:
    """Resize the shorter side of an RGB image and cut out the centre: uint8 [size, size, 3]."""
    return to_bytes(F.center_crop(F.resize(cut_ends(image), [resize], antialias=True), [size]))


def cut_ends(image: Image.Image) -> Image.Image:
    """Return the middle of an image that is extremely long: resized as a whole, 60000 x 1 pixels would take 12 GB."""
    longest = _LONGEST * min(image.size)
    if max(image.size) <= longest:
        return image
    return F.center_crop(image, [min(image.height, longest), min(image.width, longest)])


def to_bytes(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to uint8 [H, W, 3].

    v2.PILToTensor takes four times as long (0.1 ms), which tells for small images.
    """
    return torch.from_numpy(np.array(image))
