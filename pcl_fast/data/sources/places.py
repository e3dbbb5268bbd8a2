"""Places205 as its lists name it."""

from __future__ import annotations

from pathlib import Path

from pcl_fast.data.sources.folder import ImageFolder
from pcl_fast.errors import ImageError

_TRAIN, _TEST = "train_places205.csv", "val_places205.csv"


def holds_places(folder: Path) -> bool:
    """Whether one of Places205's lists is in the folder."""
    return (folder / _TRAIN).is_file() or (folder / _TEST).is_file()


def find_places(folder: Path) -> tuple[ImageFolder, ImageFolder]:
    """Return Places205's training and validation images from its two lists, which have a "path label" in a line.

    The paths are relative to the folder. Classes are named by their numbers.

    Raises:
        ImageError: a list is missing or has a line of another form, or an image is missing; names it.
    """
    return _read(folder, _TRAIN), _read(folder, _TEST)


def _read(folder: Path, name: str) -> ImageFolder:
    try:
        lines = (folder / name).read_text().splitlines()
    except OSError as error:
        raise ImageError(f"{folder / name} is missing; Places205 and its lists are at places.csail.mit.edu") from error
    paths, labels = [], []
    for number, line in enumerate(filter(str.strip, lines), 1):
        path, _, label = line.strip().replace(",", " ").rpartition(" ")
        if not path or not label.isdecimal():
            raise ImageError(f"{folder / name}, line {number}: {line!r} is not a path and the number of a class")
        paths.append(path.strip())
        labels.append(int(label))
    if not paths:
        raise ImageError(f"{folder / name} is empty")
    if missing := [path for path in paths if not (folder / path).is_file()]:
        raise ImageError(
            f"{len(missing)} of {len(paths)} images of {folder / name} are missing, the first is "
            f"{folder / missing[0]}; its paths must be relative to the folder of the list"
        )
    return ImageFolder(folder, tuple(paths), tuple(labels), tuple(map(str, range(max(labels) + 1))))
