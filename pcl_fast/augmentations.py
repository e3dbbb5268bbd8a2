"""Augmentations: what is done at random to an image to make a training view of it.

An augmentation is data. To add one, add an entry to AUGMENTATIONS; to make views that differ, derive them with
dataclasses.replace. How the random numbers are drawn is in data/views/draws.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Distortion:
    """A random affine map about the image's centre, drawn as torchvision's RandomAffine draws it."""

    degrees: float
    """The image is rotated by at most this angle, either way."""
    translate: float
    """It is shifted by at most this share of its height and width, either way."""
    scale: tuple[float, float]
    """Bounds of the factor by which it is enlarged."""
    shear: float
    """Its x axis is sheared by at most this angle in degrees, either way."""


@dataclass(frozen=True)
class View:
    """One random view of an image, with torchvision's distributions.

    Its steps come in this order: crop (or distortion), resize and flip, jitter and grey, blur, solarise.
    """

    size: int = 224
    """Side of the view, in pixels."""
    min_area: float = 0.2
    """A crop covers at least this share of the image. A distortion takes the whole image."""
    max_area: float = 1.0
    """A crop covers at most this share of the image."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strengths of brightness, contrast, saturation and hue, which are changed in a random order."""
    jitter_share: float = 0.0
    """Share of the views whose colours are jittered."""
    grey_share: float = 0.0
    """Share of the views that are turned grey."""
    grey_first: bool = False
    """Whether grey comes before the jitter; otherwise it comes after it."""
    blur_share: float = 0.0
    """Share of the views that are blurred."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Bounds of the blur's standard deviation, in pixels of the view; at most 2.44."""
    solarise_share: float = 0.0
    """Share of the views in which bytes x from 128 on become 255 - x."""
    flip_share: float = 0.0
    """Share of the views that are mirrored left to right."""
    distortion: Distortion | None = None
    """Replaces the random resized crop."""


AUGMENTATIONS: dict[str, View] = {
    # The paper's v1, which is MoCo v1's.
    "v1": View(jitter=(0.4, 0.4, 0.4, 0.4), jitter_share=1.0, grey_share=0.2, grey_first=True, flip_share=0.5),
    # The paper's v2, which is MoCo v2's: it adds the blur.
    "v2": View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_share=0.8, grey_share=0.2, blur_share=0.5, flip_share=0.5),
    # The paper's v2 for small images, as MoCo's authors have it for CIFAR-10.
    "no_blur": View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_share=0.8, grey_share=0.2, flip_share=0.5),
    # SimCLR's (Chen et al. 2020, appendix A), with its crops of 0.08 to 1 of the image (--data.min-crop-area).
    "simclr": View(jitter=(0.8, 0.8, 0.8, 0.2), jitter_share=0.8, grey_share=0.2, blur_share=0.5, flip_share=0.5),
    # What classifiers are trained on, with crops of 0.08 to 1 of the image.
    "crop": View(min_area=0.08, flip_share=0.5),
    # For grey handwriting that fills its image, where colour means nothing and a flip or a crop changes the class.
    "digits": View(
        blur_share=0.5,
        sigma=(0.1, 1.1),
        distortion=Distortion(degrees=20, translate=0.1, scale=(0.9, 1.3), shear=20),
    ),
}
