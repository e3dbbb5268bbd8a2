"""A held-out part of the training images, on which settings are chosen so that the test images choose nothing."""

from __future__ import annotations

import torch

from pcl_fast.errors import ImageError
from pcl_fast.seeds import Purpose, mix_seeds

# So many images tell an accuracy to half a percent, and two heads that are scored on the same ones apart by less.
_ENOUGH, _MOST = 10_000, 0.1


def usual_share(images: int) -> float:
    """Return the share that is held out unless another is wanted: 10,000 images, but at most a tenth."""
    return min(_MOST, _ENOUGH / images)


def hold_out(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Draw the images to hold out: the share of every class, rounded, but at least one image and never all.

    Args:
        labels: int64 [n], classes from 0 without gaps, on the CPU.
        share: between 0 and 1.
        seed: draws the same everywhere.

    Returns:
        bool [n], True for what is held out.

    Raises:
        ImageError: a class has a single image.
        ValueError: the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share that is held out must lie between 0 and 1, got {share}")
    held = torch.zeros(len(labels), dtype=torch.bool)
    counts = torch.bincount(labels)
    if single := (counts < 2).nonzero().view(-1).tolist():
        raise ImageError(
            f"{len(single)} of {len(counts)} classes (number {', '.join(map(str, single[:5]))}"
            f"{', ...' if len(single) > 5 else ''}) have a single training image, so it cannot be both held out and "
            "trained on; with a single learning rate and weight decay nothing is held out"
        )
    generator = torch.Generator().manual_seed(mix_seeds(seed, Purpose.EVALUATION))
    # Sorting shuffled positions by class keeps them shuffled within it.
    shuffled = torch.randperm(len(labels), generator=generator)
    shuffled = shuffled[labels[shuffled].argsort(stable=True)]
    wanted = (counts * share).round().long().clamp(min=1).minimum(counts - 1)
    for of_class, count in zip(shuffled.split(counts.tolist()), wanted.tolist(), strict=True):
        held[of_class[:count]] = True
    return held
