"""Places205 as its lists name it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pcl_fast.data.sources.folder import ImageFolder
from pcl_fast.data.sources.images import reason_of
from pcl_fast.errors import ImageError

_TRAIN, _TEST = "train_places205.csv", "val_places205.csv"
# Where lists and images lie in the folder: beside each other, or as the official archives unpack.
_LISTS = (".", "trainvalsplit_places205")
_IMAGES = (".", "data/vision/torralba/deeplearning/images256")
_LINE = re.compile(r"(.+?)[ ,\t]+(\d+)")


def holds_places(folder: Path) -> bool:
    """Return whether one of Places205's lists is in the folder."""
    return any((folder / place / name).is_file() for place in _LISTS for name in (_TRAIN, _TEST))


def find_places(folder: Path) -> tuple[ImageFolder, ImageFolder]:
    """Return Places205's training and validation images from its two lists, which have a "path label" in a line.

    The lists lie in the folder, or in trainvalsplit_places205 in it. Their paths are relative to the folder, or to
    data/vision/torralba/deeplearning/images256 in it, as the official archives unpack. Classes are named by their
    numbers.

    Raises:
        ImageError: a list is missing or has a line of another form, or an image is missing; names it.
    """
    return _read(folder, _TRAIN), _read(folder, _TEST)


def _read(folder: Path, name: str) -> ImageFolder:
    file = next((folder / place / name for place in _LISTS if (folder / place / name).is_file()), folder / name)
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise ImageError(
            f"cannot read {file}: {reason_of(error)}; Places205 and its lists are at places.csail.mit.edu"
        ) from error
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        parts = _LINE.fullmatch(line.strip())
        if parts is None:
            raise ImageError(f"{file}, line {number}: {line!r} is not a path and the number of a class")
        paths.append(parts[1])
        labels.append(int(parts[2]))
    if not paths:
        raise ImageError(f"{file} is empty")
    root = next((folder / place for place in _IMAGES if (folder / place / paths[0]).is_file()), folder)
    if missing := _missing(root, paths):
        raise ImageError(
            f"{len(missing)} of {len(paths)} images of {file} are missing, the first is {root / missing[0]}; the paths "
            f"in the lists must be relative to {folder}, or to {_IMAGES[1]} in it"
        )
    return ImageFolder(root, tuple(paths), tuple(labels), tuple(map(str, range(max(labels) + 1))))


def _missing(root: Path, paths: Sequence[str]) -> list[str]:
    """Return those of the paths that are not there. A folder is listed once: asking for each of 2.4 million files takes
    a network disk hours.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in listed:
            place = root / folder
            listed[folder] = set(os.listdir(place)) if place.is_dir() else set()
        if name not in listed[folder]:
            missing.append(path)
    return missing
