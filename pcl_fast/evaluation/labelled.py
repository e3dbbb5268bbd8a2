"""The labelled images that evaluation works on: a part to learn from, and a part to be tested on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pcl_fast.data import ImageFolder, ImageSet, open_set
from pcl_fast.data.sources.places import find_places, holds_places
from pcl_fast.errors import ImageError

TRAIN, TEST = "train", "val"


@dataclass(frozen=True)
class Labelled:
    """Two image sets of the same classes.

    train, test: the images.
    train_labels, test_labels: int64 [n], numbers of their classes from 0 without gaps.
    classes: the classes' names.
    """

    train: ImageSet
    test: ImageSet
    train_labels: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]

    def describe(self) -> str:
        """Say how much there is."""
        return f"{len(self.train)} training and {len(self.test)} test images of {len(self.classes)} classes"


def holds_labelled(folder: Path) -> str | None:
    """Say why `open_labelled` cannot work in this folder, or return None."""
    if holds_places(folder) or ((folder / TRAIN).is_dir() and (folder / TEST).is_dir()):
        return None
    return f"{folder} has no folders {TRAIN} and {TEST}, nor Places205's lists"


def open_labelled(folder: Path, format: str = "folder", apart_from: Path | None = None) -> Labelled:
    """Open folder/train and folder/val, each a folder of class folders or of tar shards; or Places205 by its lists.

    Raises:
        ImageError: one of them is missing or has no labels, the classes are not the same in both, or `apart_from`, a
            folder, lies among the images.
    """
    if holds_places(folder):
        return pair(*find_places(folder))
    return pair(*(_open_part(folder, part, format, apart_from) for part in (TRAIN, TEST)))


def holds_labels(folder: Path) -> str | None:
    """Say why `open_training` cannot work in this folder, or return None."""
    if (folder / TRAIN).is_dir() or any(entry.is_dir() for entry in os.scandir(folder)) or any(folder.glob("*.tar")):
        return None
    return f"{folder} has no class folders"


def open_training(
    folder: Path, format: str = "folder", apart_from: Path | None = None
) -> tuple[ImageSet, torch.Tensor]:
    """Open folder/train, or the folder itself if it has no train in it.

    Returns:
        The images, and labels int64 [n] that number their classes from 0 without gaps.

    Raises:
        ImageError: there are no images, they have no labels, or `apart_from`, a folder, lies among them.
    """
    root = folder / TRAIN if (folder / TRAIN).is_dir() else folder
    images = open_set(root, format, apart_from=apart_from)
    return images, _classes(images, "training images")[1]


def pair(train: ImageSet, test: ImageSet) -> Labelled:
    """Make a pair of two labelled image sets.

    Raises:
        ImageError: one has no labels, or classes that the other has not.
    """
    train_classes, train_labels = _classes(train, "training images")
    test_classes, test_labels = _classes(test, "test images")
    for mine, others, where in (
        (train_classes, test_classes, "the test images"),
        (test_classes, train_classes, "the training images"),
    ):
        if missing := [name for name in mine if name not in others]:
            raise ImageError(
                f"{len(missing)} of {len(mine)} classes are not among {where}: {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}; training and test images must be of the same classes"
            )
    return Labelled(train, test, train_labels, test_labels, train_classes)


def _classes(images: ImageSet, what: str) -> tuple[tuple[str, ...], torch.Tensor]:
    """Return the names of the classes that have images, in order, and labels int64 [n] that number them."""
    if images.labels is None:
        raise ImageError(f"the {what} have no labels; they must lie in class folders, or beside .cls members in shards")
    present, labels = torch.as_tensor(images.labels).unique(return_inverse=True)
    # Tar shards number their classes.
    names = images.classes if isinstance(images, ImageFolder) else None
    return tuple(names[number] if names else str(number) for number in present.tolist()), labels


def _open_part(folder: Path, part: str, format: str, apart_from: Path | None) -> ImageSet:
    if not (folder / part).is_dir():
        raise ImageError(
            f"{folder / part} is missing; --data wants a folder with {TRAIN} and {TEST} in it, each of class "
            "folders, or of tar shards with --format webdataset; or Places205 with its lists"
        )
    return open_set(folder / part, format, apart_from=apart_from)
