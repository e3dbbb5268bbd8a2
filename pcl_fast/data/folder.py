"""Finding the images of a data set and reading one of them."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pcl_fast.errors import ImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

# Opening a file's header costs about 0.1 ms on a local disk and some milliseconds on a network one, so that this many
# can be looked at before training without anyone noticing.
_HEADERS_CHECKED = 20_000


@dataclass(frozen=True)
class ImageFolder:
    """The images of a data set, in a fixed order that defines their index.

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
        return self.root / self.paths[index]

    def read(self, index: int) -> Image.Image:
        """Decode image `index` as RGB.

        Raises:
            ImageError: the file is missing, truncated or not an image; names the file and the reason.
        """
        try:
            with Image.open(os.path.join(self.root, self.paths[index])) as image:
                return image.convert("RGB")
        except Exception as error:  # PIL's plugins raise whatever their parsers run into
            raise ImageError(f"cannot read image {self.path(index)}: {error}") from error

    def fingerprint(self) -> str:
        """Identifies names and order of the images: what the indices in a checkpoint refer to."""
        return f"{len(self)} images, sha256 {hashlib.sha256(chr(10).join(self.paths).encode()).hexdigest()[:16]}"


def find_images(root: Path) -> ImageFolder:
    """List a folder of class folders (root/class/.../image) or a flat folder (root/image).

    Raises:
        ImageError: no such folder, no images, images both beside and inside class folders, or an empty file.
    """
    root = Path(root)
    if not root.is_dir():
        raise ImageError(f"{root} is not a folder; --data wants a folder of class folders, or of images")
    flat, folders = [], []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir():
            folders.append(entry.name)
        elif _is_image(entry.name):
            flat.append((entry.name, _size(Path(entry.path))))
    per_class = {name: _images_below(root, name) for name in folders}
    per_class = {name: images for name, images in per_class.items() if images}
    if flat and per_class:
        raise ImageError(
            f"{root} has images ({flat[0][0]}, ...) and class folders with images ({next(iter(per_class))}, ...); "
            "use one or the other"
        )
    found = flat or [image for images in per_class.values() for image in images]
    if not found:
        raise ImageError(f"{root} has no images in it or in its folders ({', '.join(EXTENSIONS)})")
    if empty := [name for name, size in found if size == 0]:
        raise ImageError(f"{len(empty)} empty image files, the first is {root / empty[0]}")
    labels = tuple(label for label, images in enumerate(per_class.values()) for _ in images)
    return ImageFolder(root, tuple(name for name, _ in found), labels if per_class else None, tuple(per_class))


def check_headers(folder: ImageFolder, rank: int = 0, size: int = 1) -> None:
    """Open the header of every image, or of some 20,000 evenly spaced ones of a larger set; each rank does its share.

    Raises:
        ImageError: some of them are no images; names the first.
    """
    step = max(1, len(folder) // _HEADERS_CHECKED)
    indices = range(0, len(folder), step)[rank::size]
    with ThreadPoolExecutor(8) as pool:
        broken = [fault for fault in pool.map(lambda index: _header_fault(folder.path(index)), indices) if fault]
    if broken:
        raise ImageError(f"{len(broken)} of {len(indices)} files looked at are no images, the first is {broken[0]}")


def _header_fault(path: Path) -> str | None:
    try:
        with Image.open(path):
            return None
    except Exception as error:
        return f"{path}: {error}"


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:  # a link to nowhere, say
        raise ImageError(f"cannot read image {path}: {error}") from error


def _images_below(root: Path, name: str) -> list[tuple[str, int]]:
    """(path relative to root, bytes) of all images below root/name, sorted."""
    found = []
    for folder, _, files in os.walk(root / name, followlinks=True):
        relative = Path(folder).relative_to(root)
        found += [((relative / file).as_posix(), _size(Path(folder) / file)) for file in files if _is_image(file)]
    return sorted(found)
