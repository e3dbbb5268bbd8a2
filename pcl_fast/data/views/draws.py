"""The recipes of the training views, and their random numbers: what is done to which image, and by how much.

Both loaders take their numbers from here and differ only in who carries them out. Every number is a hash of seed,
epoch, image and view, so that the views are the same for any number of ranks, workers and threads, whichever loader
makes them, and after any interruption: a loader has no random state that a checkpoint would have to hold.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pcl_fast.kernels.photometric_plain import Op
from pcl_fast.seeds import Purpose, mix_seeds


@dataclass(frozen=True)
class Distortion:
    """A random affine map about the image's centre, as torchvision's RandomAffine draws it."""

    degrees: float
    translate: float
    """As a share of height and width."""
    scale: tuple[float, float]
    shear: float
    """Of the x axis, in degrees."""


@dataclass(frozen=True)
class Recipe:
    """One random view: crop (or distortion), resize, colour, blur and flip, with torchvision's distributions."""

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strengths of brightness, contrast, saturation and hue, which come in a random order."""
    jitter_share: float = 0.0
    """Of the views that are jittered."""
    grey_share: float = 0.0
    grey_first: bool = False
    """Grey before the jitter, or after it."""
    blur_share: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    """Bounds of the blur's standard deviation, in pixels of the view."""
    flip_share: float = 0.0
    distortion: Distortion | None = None
    """Instead of a random resized crop."""


# v1 and v2 are the paper's (and MoCo's). digits is for grey handwriting that fills its image, where colour means
# nothing and a flip or a crop changes the class.
RECIPES = {
    "v1": Recipe(jitter=(0.4, 0.4, 0.4, 0.4), jitter_share=1.0, grey_share=0.2, grey_first=True, flip_share=0.5),
    "v2": Recipe(jitter=(0.4, 0.4, 0.4, 0.1), jitter_share=0.8, grey_share=0.2, blur_share=0.5, flip_share=0.5),
    "digits": Recipe(
        blur_share=0.5,
        sigma=(0.1, 1.1),
        distortion=Distortion(degrees=20, translate=0.1, scale=(0.9, 1.3), shear=20),
    ),
}

_RATIO = (3 / 4, 4 / 3)  # width to height of a crop
_ATTEMPTS = 10  # to place a crop within the image, before torchvision gives up and takes the centre

# Which of a view's uniform numbers is for what.
_AREA, _ASPECT = slice(0, _ATTEMPTS), slice(_ATTEMPTS, 2 * _ATTEMPTS)
_TOP, _LEFT, _JITTER, _ORDER, _GREY, _BLUR, _SIGMA, _FLIP = range(2 * _ATTEMPTS, 2 * _ATTEMPTS + 8)
_FACTORS = slice(_FLIP + 1, _FLIP + 5)
_DISTORTION = slice(0, 5)
_COUNT = _FACTORS.stop

_ORDERS = np.array(list(itertools.permutations((Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.HUE))), dtype=np.int32)


class Views(NamedTuple):
    """What makes one view of each of n images, in this order.

    window: int64 [n, 4], the crop's top, left, height and width.
    matrix: float32 [n, 2, 3] or None: from a pixel of the distorted image to one of the image, both counted from the
        corner (a pixel's centre is at a half).
    flip: bool [n], left to right.
    ops, factors: int32 and float32 [n, 5]; see kernels/photometric.py.
    sigma: float32 [n], of the blur in pixels; 0 without.
    """

    window: np.ndarray
    matrix: np.ndarray | None
    flip: np.ndarray
    ops: np.ndarray
    factors: np.ndarray
    sigma: np.ndarray


def draw_views(
    recipe: Recipe, min_area: float, sizes: np.ndarray, *, seed: int, epoch: int, view: int, index: np.ndarray
) -> Views:
    """Draw one view per image.

    Args:
        min_area: a crop covers at least this share of its image.
        sizes: int64 [n, 2], heights and widths of the images.
        view: 0 for the query's, 1 for the key's.
        index: int64 [n], positions in the data set.
    """
    uniform = uniforms(mix_seeds(seed, Purpose.VIEWS, epoch, view), index, _COUNT)
    if recipe.distortion is None:
        window, matrix = _crops(uniform, sizes, min_area), None
    else:
        window = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        matrix = _distortions(uniform[:, _DISTORTION], sizes, recipe.distortion)
    ops, factors = _colours(uniform, recipe)
    sigma = np.where(uniform[:, _BLUR] < recipe.blur_share, _between(uniform[:, _SIGMA], *recipe.sigma), 0.0)
    return Views(window, matrix, uniform[:, _FLIP] < recipe.flip_share, ops, factors, sigma.astype(np.float32))


def uniforms(seed: int, index: np.ndarray, count: int) -> np.ndarray:
    """float64 [n, count] in [0, 1): for every index the first numbers of a splitmix64 generator of its own."""
    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        state = _mix(index.astype(np.uint64) + np.uint64(seed))[:, None]
        bits = _mix(state + np.arange(1, count + 1, dtype=np.uint64) * golden)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)


def _between(uniform: np.ndarray, least: float, most: float) -> np.ndarray:
    return least + uniform * (most - least)


def _crops(uniform: np.ndarray, sizes: np.ndarray, min_area: float) -> np.ndarray:
    """RandomResizedCrop's windows: the first of ten attempts that fits into the image, else the centre."""
    rows = np.arange(len(sizes))
    height, width = sizes[:, :1], sizes[:, 1:]
    area = _between(uniform[:, _AREA], min_area, 1.0) * (height * width)
    ratio = np.exp(_between(uniform[:, _ASPECT], *np.log(_RATIO)))
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.argmax(axis=1)
    crop = np.stack([heights[rows, first], widths[rows, first]], axis=1).astype(np.int64)
    at = np.floor(uniform[:, [_TOP, _LEFT]] * (sizes - crop + 1)).astype(np.int64)
    central = _central_crops(sizes)
    found = fits.any(axis=1)[:, None]
    return np.concatenate([np.where(found, at, (sizes - central) // 2), np.where(found, crop, central)], axis=1)


def _central_crops(sizes: np.ndarray) -> np.ndarray:
    """Heights and widths of the images, cut to a ratio that a crop may have."""
    height, width = sizes[:, 0], sizes[:, 1]
    narrow, wide = width < _RATIO[0] * height, width > _RATIO[1] * height
    return np.stack(
        [
            np.where(narrow, np.rint(width / _RATIO[0]), height),
            np.where(wide, np.rint(height * _RATIO[1]), width),
        ],
        axis=1,
    ).astype(np.int64)


def _distortions(uniform: np.ndarray, sizes: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Inverse of: shift the centre to the origin, scale, shear, rotate, shift back and by the translation."""
    angle = np.radians(_between(uniform[:, 0], -distortion.degrees, distortion.degrees))
    shear = np.tan(np.radians(_between(uniform[:, 4], -distortion.shear, distortion.shear)))
    centre = sizes[:, ::-1] / 2.0  # x, y
    furthest = distortion.translate * sizes[:, ::-1]
    shift = np.rint(_between(uniform[:, 1:3], -furthest, furthest))
    linear = np.stack([np.cos(angle), -np.cos(angle) * shear - np.sin(angle)], axis=1)
    linear = np.stack([linear, np.stack([np.sin(angle), np.cos(angle) - np.sin(angle) * shear], axis=1)], axis=1)
    inverse = np.linalg.inv(linear * _between(uniform[:, 3], *distortion.scale)[:, None, None])
    offset = centre - (inverse @ (centre + shift)[:, :, None])[:, :, 0]
    return np.concatenate([inverse, offset[:, :, None]], axis=2).astype(np.float32)


def _colours(uniform: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """ops and factors of Views: four slots for the jitter, one for grey before or after them."""
    order = _ORDERS[np.floor(uniform[:, _ORDER] * math.factorial(4)).astype(np.int64)]
    strength = np.array(recipe.jitter)
    middle = np.array([1.0, 1.0, 1.0, 0.0])  # the factors that change nothing
    amount = _between(uniform[:, _FACTORS], middle - strength, middle + strength)
    factors = np.take_along_axis(amount, order - Op.BRIGHTNESS, axis=1)
    jitter = np.where(uniform[:, [_JITTER]] < recipe.jitter_share, order, Op.NONE)
    grey = np.where(uniform[:, [_GREY]] < recipe.grey_share, Op.GRAYSCALE, Op.NONE)
    nothing = np.zeros_like(factors[:, :1])
    if recipe.grey_first:
        ops, factors = np.concatenate([grey, jitter], axis=1), np.concatenate([nothing, factors], axis=1)
    else:
        ops, factors = np.concatenate([jitter, grey], axis=1), np.concatenate([factors, nothing], axis=1)
    return ops.astype(np.int32), factors.astype(np.float32)
