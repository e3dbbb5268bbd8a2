"""COCO's images and annotated objects, from instances_*.json and the folder of the images beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as rle

from pcl_fast.data.sources.folder import ImageFolder
from pcl_fast.errors import ImageError

TRAIN, TEST = "train2017", "val2017"
# An object that is thinner than this, in pixels, is left out: no detector could find it, and scaled down its corners
# might fall together.
_LEAST_SIDE = 0.1
_SOURCE = "train2017.zip, val2017.zip and annotations_trainval2017.zip are at https://cocodataset.org/#download"


@dataclass(frozen=True)
class CocoSplit:
    """Images with annotated objects.

    images: without labels; those that have no object too.
    ids: int64 [n], COCO's numbers of the images.
    sizes: int64 [n, 2], the images' heights and widths as the annotations have them.
    categories: (COCO's number, name) of every category, by number.
    boxes: float32 [m_i, 4] of every image: x1, y1, x2, y2 in pixels from the image's upper left corner, within it.
    labels: int64 [m_i] of every image: positions in `categories`.
    annotations: the file that says so.
    crowds: how many crowds of objects were left out.
    degenerate: how many objects were left out because they have no area or no outline.
    """

    images: ImageFolder
    ids: np.ndarray
    sizes: np.ndarray
    categories: tuple[tuple[int, str], ...]
    boxes: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    annotations: Path
    crowds: int
    degenerate: int
    outlines: _Outlines

    def __len__(self) -> int:
        return len(self.images)

    def masks(self, index: int) -> np.ndarray:
        """Return uint8 [m_i, height, width] of zeros and ones: the masks of image `index`'s objects."""
        height, width = self.sizes[index].tolist()
        masks = [_fill(outline, height, width) for outline in self.outlines.of(index)]
        return np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)


def holds_coco(folder: Path) -> str | None:
    """Say why `read_coco` cannot work in this folder, or return None. Only looks whether its parts are there."""
    missing = [path for split in (TRAIN, TEST) for path in _parts(folder, split) if not path.exists()]
    return f"{folder} has no {missing[0].relative_to(folder)}" if missing else None


def read_coco(folder: Path, split: str) -> CocoSplit:
    """Read folder/annotations/instances_SPLIT.json, whose images lie in folder/SPLIT.

    Raises:
        ImageError: a part of it is missing, see also `read_instances`.
    """
    images, annotations = _parts(folder, split)
    for path in (annotations, images):
        if not path.exists():
            raise ImageError(
                f"{path} is missing; COCO is {TRAIN}/, {TEST}/ and annotations/instances_{TRAIN}.json and "
                f"instances_{TEST}.json in one folder ({_SOURCE})"
            )
    return read_instances(images, annotations)


def read_instances(images: Path, annotations: Path) -> CocoSplit:
    """Read a file of annotations in COCO's form, and see that all of its images are in the folder `images`.

    Crowds are left out, and objects that have no area.

    Raises:
        ImageError: the file is not of this form, an image is missing, or an annotation is of an image or a category
            that does not exist; names it.
    """
    found = _load(annotations)
    entries = sorted(found["images"], key=lambda entry: entry["id"])
    _refuse_missing(images, [entry["file_name"] for entry in entries], annotations)
    categories = tuple(sorted((entry["id"], entry["name"]) for entry in found["categories"]))
    objects = _Objects(entries, categories, annotations)
    for annotation in found["annotations"]:
        objects.add(annotation)
    boxes, labels, outlines = objects.packed()
    return CocoSplit(
        images=ImageFolder(Path(images), tuple(entry["file_name"] for entry in entries), None, ()),
        ids=np.array([entry["id"] for entry in entries], np.int64),
        sizes=np.array([(entry["height"], entry["width"]) for entry in entries], np.int64).reshape(-1, 2),
        categories=categories,
        boxes=boxes,
        labels=labels,
        annotations=annotations,
        crowds=objects.crowds,
        degenerate=objects.degenerate,
        outlines=outlines,
    )


def _parts(folder: Path, split: str) -> tuple[Path, Path]:
    """Return the folder of a split's images, and the file of its annotations."""
    return folder / split, folder / "annotations" / f"instances_{split}.json"


# What is needed of every entry of a list.
_FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def _load(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except ValueError as error:
        raise ImageError(f"{path} is not JSON ({error}); was it copied whole?") from error
    for name, fields in _FIELDS.items():
        if not isinstance(found, dict) or name not in found:
            raise ImageError(f'{path} has no "{name}"; it must be a file like COCO\'s instances_{TRAIN}.json')
        for number, entry in enumerate(found[name]):
            if missing := [field for field in fields if field not in entry]:
                raise ImageError(f'{path}: entry {number} of "{name}" has no "{missing[0]}"')
    return found


def _refuse_missing(folder: Path, names: list[str], annotations: Path) -> None:
    there = {entry.name for entry in os.scandir(folder)}
    missing = [name for name in names if name not in there and not (folder / name).is_file()]
    if missing:
        raise ImageError(
            f"{len(missing)} of the {len(names)} images of {annotations} are not in {folder}, the first is {missing[0]}"
            f"; {_SOURCE}"
        )


class _Object(NamedTuple):
    box: tuple[float, float, float, float]
    label: int
    outline: bytes


class _Objects:
    """Gathers the objects of all images."""

    def __init__(self, entries: list[dict], categories: Sequence[tuple[int, str]], path: Path):
        self.path, self.crowds, self.degenerate = path, 0, 0
        self._place = {entry["id"]: place for place, entry in enumerate(entries)}
        self._sizes = [(entry["height"], entry["width"]) for entry in entries]
        self._label = {number: label for label, (number, _) in enumerate(categories)}
        self._found: list[list[_Object]] = [[] for _ in entries]

    def add(self, annotation: dict[str, Any]) -> None:
        name = f"{self.path}: annotation {annotation['id']}"
        place, label = self._place.get(annotation["image_id"]), self._label.get(annotation["category_id"])
        if place is None:
            raise ImageError(f"{name} is of image {annotation['image_id']}, which the file does not list")
        if label is None:
            raise ImageError(f"{name} is of category {annotation['category_id']}, which the file does not list")
        if annotation.get("iscrowd", 0):
            self.crowds += 1
            return
        box = _clip(annotation["bbox"], *self._sizes[place], name)
        outline = _outline(annotation.get("segmentation"), name)
        if box is None or outline is None:
            self.degenerate += 1
        else:
            self._found[place].append(_Object(box, label, outline))

    def packed(self) -> tuple[list[np.ndarray], list[np.ndarray], _Outlines]:
        """Return boxes and labels of every image, and all outlines."""
        boxes = [np.array([item.box for item in found], np.float32).reshape(-1, 4) for found in self._found]
        labels = [np.array([item.label for item in found], np.int64) for found in self._found]
        return boxes, labels, _Outlines([[item.outline for item in found] for found in self._found])


def _clip(box: Sequence[float], height: int, width: int, name: str) -> tuple[float, float, float, float] | None:
    """Turn x, y, width, height into the corners of what lies in the image; None if that has no area."""
    if len(box) != 4 or not np.isfinite(box).all():
        raise ImageError(f"{name} has the box {box}; it must be four numbers: x, y, width, height")
    x1, y1 = max(box[0], 0.0), max(box[1], 0.0)
    x2, y2 = min(box[0] + box[2], width), min(box[1] + box[3], height)
    return (x1, y1, x2, y2) if min(x2 - x1, y2 - y1) >= _LEAST_SIDE else None


def _outline(segmentation: Any, name: str) -> bytes | None:
    """Pack polygons, or a run-length code; None if there is nothing in it."""
    if segmentation is None:
        raise ImageError(f'{name} has no "segmentation"; masks are learned from it')
    if isinstance(segmentation, list):
        # A polygon with less than three corners has no area, and pairs of them would be taken for boxes.
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
    elif not (isinstance(segmentation, dict) and segmentation.keys() >= {"counts", "size"}):
        raise ImageError(f'{name}: its "segmentation" must be polygons, or a run-length code with counts and size')
    return json.dumps(segmentation, separators=(",", ":")).encode() if segmentation else None


def _fill(outline: Any, height: int, width: int) -> np.ndarray:
    """Return uint8 [height, width], 1 within."""
    if isinstance(outline, list):
        return rle.decode(rle.merge(rle.frPyObjects(outline, height, width)))
    compressed = isinstance(outline["counts"], str)
    return rle.decode(outline if compressed else rle.frPyObjects(outline, height, width))


class _Outlines:
    """The outlines of all objects in one piece of memory. Worker processes share it, as they could not share 860,000
    Python objects, whose reference counts they would change.
    """

    def __init__(self, found: Sequence[Sequence[bytes]]):
        flat = [outline for outlines in found for outline in outlines]
        self._first = np.cumsum([0, *map(len, found)])
        self._begin = np.cumsum([0, *map(len, flat)])
        self._text = np.frombuffer(b"".join(flat), np.uint8)

    def of(self, index: int) -> Iterator[Any]:
        """Yield the outlines of image `index`."""
        for item in range(self._first[index], self._first[index + 1]):
            yield json.loads(self._text[self._begin[item] : self._begin[item + 1]].tobytes())
