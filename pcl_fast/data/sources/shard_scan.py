"""Walking once through a WebDataset shard: which images it holds, and where."""

from __future__ import annotations

import os
import tarfile
from array import array
from pathlib import Path
from typing import NoReturn

import numpy as np

from pcl_fast.data.sources.folder import EXTENSIONS
from pcl_fast.data.sources.images import reason_of
from pcl_fast.errors import ImageError

# A label is a class, counted from 0: nobody has so many that they need more digits.
_LABEL_DIGITS = 9


def scan(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the names of a shard's n images, and int64 [n, 3]: offset, size and label (-1: none) of each.

    All of them are there to their last byte.

    Raises:
        ImageError: the shard cannot be read or is damaged, or its members are no samples; names shard and member.
    """
    shard, last = _Shard(path), "its beginning"
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                tar.members.clear()  # in which tarfile would keep every header
                if tar.offset > end:  # at which the next header begins
                    raise ImageError(f"{path} has been cut off: member {member.name} reaches beyond the file's end")
                shard.add(member, tar)
                last = f"member {member.name}"
            shard.end_sample(tar)
            # tarfile takes a header that makes no sense for the end of the tar.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("bad header")
    except (tarfile.TarError, OSError) as error:
        raise ImageError(f"{path} cannot be read as a tar behind {last} ({reason_of(error)})") from error
    return shard.names, np.array(shard.numbers, dtype=np.int64).reshape(-1, 3)


class _Shard:
    """A shard gathers its images from its members as they come by.

    names: the images' names.
    numbers: offset, size and label (-1: none) of the first image, of the second, ...
    """

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        self.numbers = array("q")
        self._seen: set[str] = set()
        self._key = ""
        self._sample: dict[str, tarfile.TarInfo] = {}

    def add(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        """Take the next member of the tar.

        Raises:
            ImageError: it does not fit the sample that it belongs to; names it.
        """
        key, extension = _split(member.name)
        if not key or member.isdir():
            return
        if key != self._key:
            self.end_sample(tar)
            self._begin_sample(key, member)
        kind = "label" if extension == ".cls" else "image" if extension in EXTENSIONS else None
        if kind is None:
            return
        if kind in self._sample:
            self._refuse(member, f"is the second {kind} of its sample, after {self._sample[kind].name}")
        if not member.isreg() or member.issparse():
            self._refuse(
                member, "is no plain file; write what links point to, and no sparse files (tar -h --hard-dereference)"
            )
        self._sample[kind] = member

    def end_sample(self, tar: tarfile.TarFile) -> None:
        """Keep the image of the sample that is complete now.

        Raises:
            ImageError: its label is no class number; names it.
        """
        image, label = self._sample.get("image"), self._sample.get("label")
        if image is not None:
            self.names.append(image.name)
            self.numbers.extend((image.offset_data, image.size, -1 if label is None else self._label(label, tar)))
        self._sample.clear()

    def _begin_sample(self, key: str, member: tarfile.TarInfo) -> None:
        if key in self._seen:
            self._refuse(
                member,
                f"has the key {key}, which came before with other keys between; a key names one sample, whose members "
                "follow one another (tar --sort=name)",
            )
        self._seen.add(key)
        self._key = key

    def _label(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> int:
        text = os.pread(tar.fileobj.fileno(), min(member.size, 32), member.offset_data)
        digits = text.strip()
        if not digits.isdigit() or len(digits) > _LABEL_DIGITS:
            self._refuse(member, f"is no label: {text!r}; a label is an integer from 0 to {10**_LABEL_DIGITS - 1}")
        return int(digits)

    def _refuse(self, member: tarfile.TarInfo, why: str) -> NoReturn:
        raise ImageError(f"{self.path}, member {member.name} {why}")


def _split(name: str) -> tuple[str, str]:
    """Return (key, extension in lower case) of a member.

    As in WebDataset, the extension begins at the first dot of the file's name; a file without one, or with nothing
    before it, has no key.
    """
    base = name.rpartition("/")[2]
    stem, dot, _ = base.partition(".")
    if not stem or not dot:
        return "", ""
    extension = base[len(stem) :]
    return name.removesuffix(extension), extension.lower()
