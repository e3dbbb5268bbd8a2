"""What a data set is to training: encoded images in a fixed order, which defines their index."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from pcl_fast.errors import ImageError


class ImageSet(ABC):
    """An image set is a data set whose images can be read in any order, from several threads and processes.

    root: the folder in which it lies.
    labels: the class of every image, or None without labels.
    kept: whether the system may keep in memory what was read of the files. Where it need not, memory is left for what
        is of more use there.
    """

    root: Path
    labels: Sequence[int] | None
    kept: bool

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return where image `index` lies, for a person to find."""

    @abstractmethod
    def load(self, index: int) -> bytes:
        """Return the bytes of image `index` as they are stored.

        Raises:
            OSError: they cannot be read.
        """

    @abstractmethod
    def keys(self) -> Sequence[str]:
        """Return a name for every image that does not depend on where the data set lies."""

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> ImageSet:
        """Return the same data set with these images alone, in this order."""

    def open(self, index: int) -> BinaryIO:
        """Open image `index` as a file, for those who read its beginning alone.

        Raises:
            OSError: it cannot be read.
        """
        return io.BytesIO(self.load(index))

    def encoded(self, index: int) -> bytes:
        """Return the bytes of image `index` as they are stored.

        Raises:
            ImageError: they cannot be read; names the image and the reason.
        """
        try:
            return self.load(index)
        except OSError as error:
            raise self.fault(index, error) from error

    def read(self, index: int) -> Image.Image:
        """Decode image `index` as RGB.

        Raises:
            ImageError: it is missing, truncated or no image; names it and the reason.
        """
        data = self.encoded(index)
        try:
            with open_image(io.BytesIO(data)) as image:
                return to_rgb(image)
        except Exception as error:  # PIL's plugins raise whatever their parsers run into
            raise self.fault(index, error) from error

    def fault(self, index: int, error: Exception) -> ImageError:
        """Return the error to raise when image `index` cannot be used because of `error`."""
        return ImageError(
            f"cannot read image {self.name(index)}: {reason_of(error)}. `python -m pcl_fast.data check DIR` finds all "
            "such images. Move them away, or leave them out of training with --data.skip-broken"
        )

    def describe(self) -> str:
        """Say how many images and classes there are, and where."""
        classes = "without labels" if self.labels is None else f"of {len(np.unique(self.labels))} classes"
        return f"{len(self)} images {classes} in {self.root}"

    def fingerprint(self) -> str:
        """Return a text that identifies names and order of the images, to which the indices in a checkpoint refer."""
        names = "\n".join(self.keys()).encode(errors="surrogateescape")  # of any bytes, as file systems allow
        return f"{len(self)} images, sha256 {hashlib.sha256(names).hexdigest()[:16]}"


def read_whole(descriptor: int) -> bytes:
    """Return the bytes of a file that has just been opened. That takes two calls of the system: its size, its bytes."""
    size = os.fstat(descriptor).st_size
    data = os.read(descriptor, size)
    if 0 < len(data) == size:
        return data
    # It may give less at a time, of large files, and not tell the size in some file systems.
    parts = [data]
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def forget(descriptor: int, offset: int = 0, length: int = 0) -> None:
    """Let the system drop a file, or a part of it, from its memory. It reads from the disk when it is wanted again."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # of a file system without it
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def open_image(file: BinaryIO) -> Image.Image:
    """Open an encoded image with PIL, which reads its header alone.

    Raises:
        ValueError: the file is empty, or no image that PIL knows.
    """
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:  # whose message is the address of the file object
        empty = not file.seek(0, io.SEEK_END)
        raise ValueError("it is empty" if empty else "no known image format") from error


def reason_of(error: Exception) -> str:
    """Say what was wrong with an image, without the path that the system's errors repeat."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any of PIL's images to 8-bit RGB. Where `convert` would clip 16-bit greys to white, they are scaled."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # or PIL would warn, though the colours are the same
    return image.convert("RGB")
