"""Which training images keep their labels: those that a file lists, or a class-balanced draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from pcl_fast.data import ImageSet
from pcl_fast.errors import ImageError
from pcl_fast.seeds import Purpose, mix_seeds

# Keeps the draw apart from what else evaluation seeds.
_LABELS = 1


def listed_images(file: Path, images: ImageSet) -> torch.Tensor:
    """Return the positions of the images that a file lists, int64 in ascending order, whatever the order of the lines.

    A line is an image's file name, as in SimCLR's lists, or its key, "class/name" in a folder of class folders, where
    names alone are not unique.

    Raises:
        ImageError: it lists none, one that is not among the images, one twice, or a name that several images have; says
            how many, and names the first.
        OSError: it cannot be read.
    """
    # Bytes that are no text are no image's name either, which the message about the first of them will say.
    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise ImageError(f"{file} lists no images; it must hold a file name a line, such as n01440764_10026.JPEG")
    found = _find(set(names), images)
    if missing := [name for name in names if name not in found]:
        raise ImageError(
            f"{len(missing)} of the {len(names)} images that {file} lists are not among the {len(images)} training "
            f"images, the first is {missing[0]}; a line must be a file name, or class/name"
        )
    if unclear := [name for name in names if len(found[name]) > 1]:
        first, second = (images.name(place) for place in found[unclear[0]][:2])
        raise ImageError(
            f"{len(unclear)} of the {len(names)} names in {file} are those of several training images, the first is "
            f"{unclear[0]} ({first}, {second}); write class/name instead"
        )
    places = [found[name][0] for name in names]
    seen: set[int] = set()
    if twice := [place for place in places if place in seen or seen.add(place)]:
        raise ImageError(f"{file} lists {len(twice)} images twice, the first is {images.name(twice[0])}")
    return torch.tensor(sorted(places))


def _find(wanted: set[str], images: ImageSet) -> dict[str, list[int]]:
    """Return the positions of the images that have a wanted key or file name."""
    found: dict[str, list[int]] = {}
    for place, key in enumerate(images.keys()):
        for name in wanted & {key, key.rpartition("/")[2]}:
            found.setdefault(name, []).append(place)
    return found


def draw_balanced(labels: torch.Tensor, share: float, classes: Sequence[str], *, seed: int) -> torch.Tensor:
    """Draw a share of the images, as many of every class, and return their positions, int64 in ascending order.

    The number of images is rounded down, but there is at least one of each class. Where it is no multiple of the number
    of classes, some classes, drawn too, have one more. It depends on the arguments alone: all ranks draw the same.

    Args:
        labels: int64 [n], numbers of the classes.
        share: in (0, 1].
        classes: their names.
        seed: the same seed draws the same images of each class, more of them for a larger share.

    Raises:
        ImageError: a class has too few images; names it.
    """
    total = max(math.floor(share * len(labels) + 1e-6), len(classes))  # 0.29 * 100 is a little less than 29
    each, rest = divmod(total, len(classes))
    counts = torch.bincount(labels, minlength=len(classes))
    if poor := (counts < each).nonzero().view(-1).tolist():
        raise ImageError(
            f"{share:.4g} of the labels are {each} images of every class, but {len(poor)} of {len(classes)} classes "
            f"have fewer, the first is {classes[poor[0]]} with {int(counts[poor[0]])}; take a smaller share, or a list"
        )
    generator = torch.Generator().manual_seed(mix_seeds(seed, Purpose.EVALUATION, _LABELS))
    order = torch.randperm(len(labels), generator=generator)
    turn = torch.randperm(len(classes), generator=generator)
    quota = torch.full((len(classes),), each)
    quota[turn[counts[turn] > each][:rest]] += 1
    by_class = order[labels[order].argsort(stable=True)]
    of_class = labels[by_class]
    place_in_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[of_class]
    return by_class[place_in_class < quota[of_class]].sort().values
