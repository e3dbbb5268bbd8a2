"""Augmentations: what is done at random to an image to make a training view of it.

An augmentation is data. To add one, add an entry to AUGMENTATIONS; to make views that differ, derive them with
dataclasses.replace. How the random numbers are drawn is in data/views/draws.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    # BYOL's (Grill et al. 2020, appendix), with crops of 0.08 to 1. BYOL draws its second view otherwise, see there.
    "byol": View(jitter=(0.4, 0.4, 0.2, 0.1), jitter_share=0.8, grey_share=0.2, blur_share=1.0, flip_share=0.5),
    # What classifiers are trained on, with crops of 0.08 to 1 of the image.
    "crop": View(min_area=0.08, flip_share=0.5),
    # For grey handwriting that fills its image, where colour means nothing and a flip or a crop changes the class.
    "digits": View(
        blur_share=0.5,
        sigma=(0.1, 1.1),
        distortion=Distortion(degrees=20, translate=0.1, scale=(0.9, 1.3), shear=20),
    ),
}


# SwAV's small crops beside its large ones, in pixels (Caron et al. 2020, section 4.1).
_SMALL, _LARGE = 96, 224


def multi_crop(
    view: View, count: int, *, size: int | None = None, areas: tuple[float, float] = (0.05, 0.14)
) -> tuple[View, ...]:
    """Return the small crops that multi-crop adds to large ones: `Method.views` is the large ones, then these.

    Args:
        view: a large one; the small ones are drawn as it is but for size and area.
        count: of small crops.
        size: their side in pixels; None: 96/224 of the large one's, rounded.
        areas: a small crop covers at least and at most these shares of the image; see View for a view with a
            distortion, which takes the whole image.

    Returns:
        `count` times the same view. Each is drawn independently.

    Raises:
        ValueError: no number of crops, size or areas that a crop can have.
    """
    small = small_side(view.size) if size is None else size
    if count < 0 or small < 1:
        raise ValueError(f"{count} small crops of {small} px cannot be made")
    check_areas("areas", areas)
    return (replace(view, size=small, min_area=areas[0], max_area=areas[1]),) * count


def small_side(large: int) -> int:
    """Return the side of small crops beside crops of `large` px: 96/224 of it, rounded, and at least one pixel."""
    return max(1, round(large * _SMALL / _LARGE))


def check_areas(flag: str, areas: tuple[float, float]) -> None:
    """Refuse bounds of a crop's area that are no shares of an image, or in the wrong order.

    Args:
        flag: what the bounds are called on the command line.

    Raises:
        ValueError: names the flag, the bounds and what they must be.
    """
    least, most = areas
    if not 0 < least <= most <= 1:
        raise ValueError(
            f"{flag} {least:g} {most:g}: crops cover at least the first and at most the second share of an image; give "
            "two numbers in (0, 1], the smaller one first"
        )
