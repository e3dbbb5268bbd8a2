"""Folders of image files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from pcl_fast.data.sources.images import ImageSet, forget, read_whole, reason_of
from pcl_fast.data.sources.walk import files_below
from pcl_fast.errors import ImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Windows would end a text at its first byte 26.
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)
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
    kept: bool = True

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
        # Not by a file object, which asks the system nearly twice as often: around each time threads take turns at
        # running Python.
        file = os.open(os.path.join(self.root, self.paths[index]), _READ)
        try:
            data = read_whole(file)
            if not self.kept:
                forget(file)
            return data
        finally:
            os.close(file)

    def keys(self) -> tuple[str, ...]:
        return self.paths

    def subset(self, indices: Sequence[int]) -> ImageFolder:
        labels = None if self.labels is None else tuple(self.labels[index] for index in indices)
        return replace(self, paths=tuple(self.paths[index] for index in indices), labels=labels)


def find_images(root: Path, *, strict: bool = True, apart_from: Path | None = None) -> ImageFolder:
    """List a folder of class folders (root/class/.../image) or a flat folder (root/image).

    Links to folders are followed, but no folder is looked at twice; a warning says so.

    Args:
        root: the folder.
        strict: refuse empty files and broken links; otherwise they are listed like any image.
        apart_from: a folder that must not lie among the images, see `files_below`.

    Raises:
        ImageError: no such folder, no images, images both beside and inside class folders, an empty file; a folder
            cannot be looked into; the folders are no classes but the parts of a data set (train, val, ...); or
            `apart_from` lies among the images.
    """
    root = Path(root)
    try:
        is_folder = root.is_dir()
    except OSError as error:  # above it there is a folder that cannot be looked into
        raise ImageError(f"cannot look into {root}: {reason_of(error)}") from error
    if not is_folder:
        raise ImageError(f"{root} is not a folder; --data wants a folder of class folders, or of images")
    flat: list[str] = []
    per_class: dict[str, list[str]] = {}
    # By class, then by path: as a whole, "a-b/1.jpg" comes before "a/1.jpg".
    paths = filter(_is_image, files_below(root, apart_from))
    for path in sorted(paths, key=lambda path: (path.partition("/")[0], path)):
        name, slash, _ = path.partition("/")
        (per_class.setdefault(name, []) if slash else flat).append(path)
    if flat and per_class:
        raise ImageError(
            f"{root} has images ({flat[0]}, ...) and class folders with images ({next(iter(per_class))}, ...); "
            "use one or the other"
        )
    found = flat or [path for images in per_class.values() for path in images]
    if not found and any(root.glob("*.tar")):
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


def _is_image(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS) and not path.rpartition("/")[2].startswith(".")


def _refuse_empty(root: Path, paths: list[str]) -> None:
    if empty := [path for path in paths if _size(root, path) == 0]:
        raise ImageError(f"{len(empty)} empty image files, the first is {root / empty[0]}")


def _size(root: Path, path: str) -> int:
    try:
        return os.stat(os.path.join(root, path)).st_size
    except OSError as error:  # it may be a link to nowhere
        raise ImageError(f"cannot read image {root / path}: {reason_of(error)}") from error
