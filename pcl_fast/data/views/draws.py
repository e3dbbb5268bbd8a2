"""The random numbers of the training views: what is done to which image, and by how much.

Both loaders take their numbers from here and differ only in who carries them out. Every number is a hash of seed,
epoch, image and the view's place among those of its image, so that the views are the same for any number of ranks,
workers and threads, whichever loader makes them, and after any interruption: a loader has no random state that a
checkpoint would have to hold.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from pcl_fast.augmentations import Distortion, View
from pcl_fast.kernels.photometric_plain import Op
from pcl_fast.seeds import Purpose, mix_seeds

_RATIO = (3 / 4, 4 / 3)  # width to height of a crop
_ATTEMPTS = 10  # to place a crop within the image, before torchvision gives up and takes the centre

# These say which of a view's uniform numbers is for what.
_AREA, _ASPECT = slice(0, _ATTEMPTS), slice(_ATTEMPTS, 2 * _ATTEMPTS)
_TOP, _LEFT, _JITTER, _ORDER, _GREY, _BLUR, _SIGMA, _FLIP = range(2 * _ATTEMPTS, 2 * _ATTEMPTS + 8)
_FACTORS = slice(_FLIP + 1, _FLIP + 5)
_DISTORTION = slice(0, 5)
_SOLARISE = _FACTORS.stop
_COUNT = _SOLARISE + 1  # what comes to be drawn one day goes to the end, so that no other number moves

_ORDERS = np.array(list(itertools.permutations((Op.BRIGHTNESS, Op.CONTRAST, Op.SATURATION, Op.HUE))), dtype=np.int32)


class Draws(NamedTuple):
    """The random numbers that make one view of each of n images.

    window: int64 [n, 4], the crop's top, left, height and width.
    matrix: float32 [n, 2, 3], or None without a distortion. It maps a pixel of the distorted image to one of the image,
        both counted from the corner (a pixel's centre is at a half).
    flip: bool [n], whether the view is mirrored left to right.
    ops, factors: int32 and float32 [n, 5], jitter and grey; see kernels/photometric.py.
    sigma: float32 [n], the blur's standard deviation in pixels; 0 without a blur.
    solarise: bool [n], whether the view is solarised.
    """

    window: np.ndarray
    matrix: np.ndarray | None
    flip: np.ndarray
    ops: np.ndarray
    factors: np.ndarray
    sigma: np.ndarray
    solarise: np.ndarray


def draw_views(view: View, sizes: np.ndarray, *, seed: int, epoch: int, number: int, index: np.ndarray) -> Draws:
    """Draw one view per image.

    Args:
        view: what is drawn.
        sizes: int64 [n, 2], heights and widths of the images.
        seed: the run's.
        epoch: the one in which the views are seen.
        number: the view's place among those of its image; views of other places are drawn independently.
        index: int64 [n], positions in the data set.
    """
    uniform = uniforms(mix_seeds(seed, Purpose.VIEWS, epoch, number), index, _COUNT)
    if view.distortion is None:
        window, matrix = _crops(uniform, sizes, view.min_area, view.max_area), None
    else:
        window = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        matrix = _distortions(uniform[:, _DISTORTION], sizes, view.distortion)
    ops, factors = _colours(uniform, view)
    sigma = np.where(uniform[:, _BLUR] < view.blur_share, _between(uniform[:, _SIGMA], *view.sigma), 0.0)
    flip, solarise = uniform[:, _FLIP] < view.flip_share, uniform[:, _SOLARISE] < view.solarise_share
    return Draws(window, matrix, flip, ops, factors, sigma.astype(np.float32), solarise)


def uniforms(seed: int, index: np.ndarray, count: int) -> np.ndarray:
    """Return float64 [n, count] in [0, 1): for every index the first numbers of a splitmix64 generator of its own."""
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


def _crops(uniform: np.ndarray, sizes: np.ndarray, min_area: float, max_area: float) -> np.ndarray:
    """Return RandomResizedCrop's windows: the first of ten attempts that fits into the image, else the centre."""
    rows = np.arange(len(sizes))
    height, width = sizes[:, :1], sizes[:, 1:]
    area = _between(uniform[:, _AREA], min_area, max_area) * (height * width)
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
    """Return heights and widths of the images, cut to a ratio that a crop may have."""
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
    """Invert the map that moves the centre to the origin, scales, shears, rotates, moves back and translates."""
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


def _colours(uniform: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Return ops and factors of Draws: four slots for the jitter, and one for grey before or after them."""
    order = _ORDERS[np.floor(uniform[:, _ORDER] * math.factorial(4)).astype(np.int64)]
    strength = np.array(view.jitter)
    middle = np.array([1.0, 1.0, 1.0, 0.0])  # the factors that change nothing
    amount = _between(uniform[:, _FACTORS], middle - strength, middle + strength)
    factors = np.take_along_axis(amount, order - Op.BRIGHTNESS, axis=1)
    jitter = np.where(uniform[:, [_JITTER]] < view.jitter_share, order, Op.NONE)
    grey = np.where(uniform[:, [_GREY]] < view.grey_share, Op.GRAYSCALE, Op.NONE)
    nothing = np.zeros_like(factors[:, :1])
    if view.grey_first:
        ops, factors = np.concatenate([grey, jitter], axis=1), np.concatenate([nothing, factors], axis=1)
    else:
        ops, factors = np.concatenate([jitter, grey], axis=1), np.concatenate([factors, nothing], axis=1)
    return ops.astype(np.int32), factors.astype(np.float32)
