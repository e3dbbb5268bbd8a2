"""Folders of image files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from pcl_fast.data.sources.images import ImageSet, reason_of
from pcl_fast.errors import ImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# What the parts of a data set are called, of which the first is to be trained on.
_PARTS = ("train", "val", "valid", "validation", "test", "unlabeled")


@dataclass(frozen=True)
class ImageFolder(ImageSet):
    """An image folder is a data set of files below a folder.

    paths: relative to `root`, sorted by class folder and name.
    labels: class per image, or None for a flat folder.
    classes: names of the class folders, sorted; empty for a flat folder.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """Return the path of image `index`."""
        return self.root / self.paths[index]

    def name(self, index: int) -> str:
        return str(self.path(index))

    def open(self, index: int) -> BinaryIO:
        return open(os.path.join(self.root, self.paths[index]), "rb")  # a Path costs as much as the file

    def load(self, index: int) -> bytes:
        with self.open(index) as file:
            return file.read()

    def keys(self) -> tuple[str, ...]:
        return self.paths

    def subset(self, indices: Sequence[int]) -> ImageFolder:
        labels = None if self.labels is None else tuple(self.labels[index] for index in indices)
        return replace(self, paths=tuple(self.paths[index] for index in indices), labels=labels)


def find_images(root: Path, *, strict: bool = True) -> ImageFolder:
    """List a folder of class folders (root/class/.../image) or a flat folder (root/image).

    Args:
        root: the folder.
        strict: refuse empty files and broken links; otherwise they are listed like any image.

    Raises:
        ImageError: no such folder, no images, images both beside and inside class folders, an empty file; or the
            folders are no classes but the parts of a data set (train, val, ...).
    """
    root = Path(root)
    if not root.is_dir():
        raise ImageError(f"{root} is not a folder; --data wants a folder of class folders, or of images")
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    flat = [entry.name for entry in entries if _is_image(entry.name) and not entry.is_dir()]
    per_class = {entry.name: _images_below(root, entry.name) for entry in entries if entry.is_dir()}
    per_class = {name: images for name, images in per_class.items() if images}
    if flat and per_class:
        raise ImageError(
            f"{root} has images ({flat[0]}, ...) and class folders with images ({next(iter(per_class))}, ...); "
            "use one or the other"
        )
    found = flat or [image for images in per_class.values() for image in images]
    if not found and any(entry.name.endswith(".tar") for entry in entries):
        raise ImageError(f"{root} has no images but .tar files; for WebDataset shards use --data.format webdataset")
    if not found:
        raise ImageError(f"{root} has no images in it or in its folders ({', '.join(EXTENSIONS)})")
    _refuse_parts(root, per_class)
    if strict:
        _refuse_empty(root, found)
    labels = tuple(label for label, images in enumerate(per_class.values()) for _ in images)
    return ImageFolder(root, tuple(found), labels if per_class else None, tuple(per_class))


def _refuse_parts(root: Path, classes: Iterable[str]) -> None:
    """Refuse train, val and the like as classes: it is their parent that was named, as other programs want it."""
    if _PARTS[0] in classes and set(classes).issubset(_PARTS):
        raise ImageError(
            f"{root} holds the parts of a data set ({', '.join(classes)}), which would be taken for its classes; train "
            f"on {root / _PARTS[0]}"
        )


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _images_below(root: Path, name: str) -> list[str]:
    """Return the paths, relative to root, of all images below root/name, sorted."""
    found = []
    for folder, _, files in os.walk(root / name, followlinks=True):
        relative = Path(folder).relative_to(root)
        found += [(relative / file).as_posix() for file in files if _is_image(file)]
    return sorted(found)


def _refuse_empty(root: Path, paths: list[str]) -> None:
    if empty := [path for path in paths if _size(root, path) == 0]:
        raise ImageError(f"{len(empty)} empty image files, the first is {root / empty[0]}")


def _size(root: Path, path: str) -> int:
    try:
        return os.stat(os.path.join(root, path)).st_size
    except OSError as error:  # it may be a link to nowhere
        raise ImageError(f"cannot read image {root / path}: {reason_of(error)}") from error
