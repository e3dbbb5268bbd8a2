"""PASCAL VOC as its devkit lays it out: lists of images, which classes are on them, and where the objects are."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pcl_fast.data.sources.folder import ImageFolder
from pcl_fast.errors import ImageError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_PARTS = ("JPEGImages", "Annotations", "ImageSets/Main")
_SOURCE = "the devkit is at host.robots.ox.ac.uk/pascal/VOC"
# What a list says of an image.
_PRESENCE = {"1": 1, "0": 0, "-1": -1}


@dataclass(frozen=True)
class VocSplit:
    """The images of a split, and what is on them.

    images: the images, which have no single label.
    ids: their names without .jpg.
    presence: int8 [n, 20], in the order of VOC_CLASSES: 1 where the class is on the image, 0 where all of its objects
        there are marked difficult, -1 where it is not.
    root: the folder VOC2007, VOC2012, ...
    """

    images: ImageFolder
    ids: tuple[str, ...]
    presence: np.ndarray
    root: Path

    def annotation(self, index: int) -> Path:
        """Return the path of the XML file that describes image `index`."""
        return self.root / "Annotations" / f"{self.ids[index]}.xml"


class VocObjects(NamedTuple):
    """The objects on an image.

    boxes: float32 [m, 4], xmin, ymin, xmax, ymax as the file has them: pixels are counted from 1, and the last ones
        belong to the box.
    labels: int64 [m], positions in VOC_CLASSES.
    difficult: bool [m].
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    difficult: torch.Tensor


def holds_voc(folder: Path, year: int) -> bool:
    """Whether `find_devkit` would find this year."""
    return any(_complete(place) for place in _places(folder, year))


def find_devkit(folder: Path, year: int) -> Path:
    """Return the folder VOC<year>, given itself, VOCdevkit, or the folder that holds VOCdevkit.

    Raises:
        ImageError: it is not there, or lacks a part; says which and where it is to be had.
    """
    places = _places(folder, year)
    for place in places:
        if _complete(place):
            return place
    for place in places:
        if place.is_dir() and (missing := [part for part in _PARTS if not (place / part).is_dir()]) != list(_PARTS):
            raise ImageError(f"{place / missing[0]} is missing; {_SOURCE}")
    raise ImageError(f"{folder} holds no VOC{year} (looked for {places[1]} and {places[2]}); {_SOURCE}")


def _places(folder: Path, year: int) -> tuple[Path, ...]:
    name = f"VOC{year}"
    itself = (folder,) if folder.name == name else (folder / name,)
    return (*itself, folder / name, folder / "VOCdevkit" / name)


def _complete(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in _PARTS)


def read_split(folder: Path, year: int, split: str) -> VocSplit:
    """Read the lists of a split ("trainval", "test", ...) from ImageSets/Main.

    Raises:
        ImageError: a list or an image is missing, a line cannot be read, or lists name different images.
    """
    root = find_devkit(folder, year)
    lists = {name: _read_list(root / "ImageSets" / "Main" / f"{name}_{split}.txt") for name in VOC_CLASSES}
    ids = tuple(lists[VOC_CLASSES[0]])
    for name, found in lists.items():
        if found.keys() != set(ids):
            odd = sorted(found.keys() ^ set(ids))[0]
            raise ImageError(
                f"{root / 'ImageSets' / 'Main'}: the lists {VOC_CLASSES[0]}_{split}.txt and {name}_{split}.txt name "
                f"different images, {odd} is in one of them alone; one of them is incomplete"
            )
    paths = tuple(f"JPEGImages/{name}.jpg" for name in ids)
    if missing := [path for path in paths if not (root / path).is_file()]:
        raise ImageError(
            f"{len(missing)} of {len(paths)} images are missing, the first is {root / missing[0]}; {_SOURCE}"
        )
    presence = np.array([[lists[name][image] for name in VOC_CLASSES] for image in ids], dtype=np.int8)
    return VocSplit(ImageFolder(root, paths, None, ()), ids, presence, root)


def _read_list(path: Path) -> dict[str, int]:
    """Return what a list says of every image, by the image's name."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ImageError(f"{path} is missing; {_SOURCE}") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        match line.split():
            case [name, flag] if flag in _PRESENCE and name not in found:
                found[name] = _PRESENCE[flag]
            case []:
                continue
            case _:
                raise ImageError(f"{path}, line {number}: {line!r} is not the name of another image and 1, 0 or -1")
    if not found:
        raise ImageError(f"{path} is empty; {_SOURCE}")
    return found


def read_annotation(path: Path) -> VocObjects:
    """Read the objects of an image from its XML file.

    Raises:
        ImageError: the file is missing or cannot be read, or an object is of no class of VOC; names it.
    """
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
        rows = [_read_object(item) for item in objects]
    except OSError as error:
        raise ImageError(f"{path} is missing; {_SOURCE}") from error
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ImageError(f"{path} cannot be read: {error}") from error
    boxes, labels, difficult = zip(*rows, strict=True) if rows else ((), (), ())
    return VocObjects(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
    )


def _read_object(item: ElementTree.Element) -> tuple[list[float], int, bool]:
    """Return (box, label, whether it is difficult).

    Raises:
        AttributeError, TypeError, ValueError: something is missing, or no number.
    """
    name = item.findtext("name")
    if name not in VOC_CLASSES:
        raise ValueError(f"{name!r} is no class of VOC")
    box = item.find("bndbox")
    sides = [float(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
    return sides, VOC_CLASSES.index(name), item.findtext("difficult", "0").strip() == "1"
