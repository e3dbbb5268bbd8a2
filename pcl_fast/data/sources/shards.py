"""WebDataset shards: tar files of images, read in place by an index of where each image lies.

The index is written beside the shards once, so that later starts need not walk through the tars.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pcl_fast.data.sources.folder import EXTENSIONS
from pcl_fast.data.sources.images import ImageSet, forget, reason_of
from pcl_fast.data.sources.shard_scan import scan
from pcl_fast.errors import ImageError
from pcl_fast.files import write_whole
from pcl_fast.user import cache_folder

INDEX = "pcl_fast-index.npz"
MAX_OPEN = 256

_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
# The index file's version; one of another version is made anew.
_VERSION = 1
# So many shards are indexed at once: on a network disk that is waiting, not work.
_THREADS = 8


class Names:
    """Names holds many short strings in two arrays. A million of Python's would take 100 MB in every process."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        """Take the strings as arrays.

        Args:
            text: uint8, all strings in UTF-8, one after another.
            ends: int64 [n], where each of them ends.
        """
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> Names:
        """Make the arrays from Python's strings."""
        encoded = [string.encode(errors="surrogateescape") for string in strings]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __getitem__(self, index: int) -> str:
        begin = self.ends[index - 1] if index else 0
        return self.text[begin : self.ends[index]].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        text, begin = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[begin:end].decode(errors="surrogateescape")
            begin = end


class _File:
    """A file closes its descriptor when nobody refers to it any more, and so not while a thread reads from it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)


class _Files:
    """It opens files for reading, and keeps the `MAX_OPEN` that were used last open in this process."""

    def __init__(self):
        # Unlike other caches this one has no lock that a fork could leave locked in a worker.
        self.open = functools.lru_cache(MAX_OPEN)(lambda path: _File(os.open(path, os.O_RDONLY)))

    def __reduce__(self) -> tuple:
        return _Files, ()


@dataclass(frozen=True, eq=False)
class TarShards(ImageSet):
    """Tar shards are a data set of images in tar files.

    root: the folder of the shards.
    shards: their names, sorted.
    shard: int32 [n], position in `shards` of the one that holds the image.
    offset, size: int64 [n], where in it the image's bytes lie.
    labels: int64 [n], or None.
    members: n names within the shards.
    """

    root: Path
    shards: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray | None
    members: Names
    kept: bool = True
    _files: _Files = field(default_factory=_Files, repr=False)

    def __len__(self) -> int:
        return len(self.offset)

    def name(self, index: int) -> str:
        return f"{self.root / self.shards[self.shard[index]]}, member {self.members[index]}"

    def load(self, index: int) -> bytes:
        size, offset = int(self.size[index]), int(self.offset[index])
        file = self._files.open(os.path.join(self.root, self.shards[self.shard[index]]))
        data = os.pread(file.descriptor, size, offset)
        if not self.kept:
            forget(file.descriptor, offset, size)
        if len(data) < size:
            raise OSError(f"only {len(data)} of its {size} bytes are there; the shard was cut off after it was indexed")
        return data

    def keys(self) -> list[str]:
        places = zip(self.shard.tolist(), self.members, strict=True)
        return [f"{self.shards[shard]}/{member}" for shard, member in places]

    def subset(self, indices: Sequence[int]) -> TarShards:
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            shard=self.shard[chosen],
            offset=self.offset[chosen],
            size=self.size[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            members=Names.pack(self.members[index] for index in chosen),
        )


def find_shards(root: Path) -> TarShards:
    """List the images of a folder of WebDataset shards (root/*.tar), ordered by the shards' names and their members.

    A sample is a run of members that share a key, the path up to the first dot of the file's name. It has one image
    (key.jpg, ...) and perhaps a label (key.cls, an integer in ASCII); other members are ignored, and so are samples
    without an image.

    The index of a folder that cannot be written is kept in the user's cache directory. It is made anew when the names,
    sizes or times of the shards have changed.

    Raises:
        ImageError: no such folder, no shards, no images, compressed or damaged shards, two images in a sample, a key
            that comes again, a label that is no class number, or labels for some images alone; names the shard and the
            member.
    """
    root = Path(root)
    shards = _shard_names(root)
    header = json.dumps({"version": _VERSION, "shards": [_state(root / name) for name in shards]})
    places = _places(root)
    index = next(filter(None, (_load(place, header) for place in places)), None)
    if index is None:
        index = _make_index(root, shards)
        _save(places, {"header": np.array(header), **index})
    members = Names(index["text"], index["ends"])
    return TarShards(root, shards, index["shard"], index["offset"], index["size"], index.get("labels"), members)


def _shard_names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise ImageError(f"{root} is not a folder; --data wants a folder of .tar shards")
    files = sorted(entry.name for entry in os.scandir(root) if entry.name[0] != "." and not entry.is_dir())
    shards = tuple(name for name in files if name.endswith(".tar"))
    compressed = [name for name in files if name.endswith(_COMPRESSED)]
    if not shards and compressed:
        raise ImageError(
            f"{root} has compressed shards ({compressed[0]}, ...), from whose middle no image can be read; unpack them "
            "to .tar (gunzip, unzstd, ...)"
        )
    if not shards and any((root / "train").glob("*.tar")):
        raise ImageError(f"{root} has no .tar shards in it, but its folder train has; train on {root / 'train'}")
    if not shards:
        raise ImageError(f"{root} has no .tar shards in it; for a folder of image files use --data.format folder")
    return shards


def _state(shard: Path) -> tuple[str, int, int]:
    """Return what tells whether an index was made of this very file."""
    try:
        stat = shard.stat()
    except OSError as error:  # it may be a link to nowhere
        raise ImageError(f"cannot read shard {shard}: {reason_of(error)}") from error
    return shard.name, stat.st_size, stat.st_mtime_ns


def _places(root: Path) -> tuple[Path, Path]:
    """Return where the index may lie, the better place first."""
    return root / INDEX, cache_folder() / f"shards-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"


def _load(place: Path, header: str) -> dict[str, np.ndarray] | None:
    """Return the arrays of an index file, or None if there is none, or one of other shards."""
    try:
        with np.load(place, allow_pickle=False) as file:
            return {name: file[name] for name in file.files} if str(file["header"]) == header else None
    except Exception:  # NumPy and zipfile raise many things when a file is spoiled, all of which have the same cure
        return None


def _save(places: Iterable[Path], arrays: dict[str, np.ndarray]) -> None:
    """Write an index file at the first of the places where that is possible."""
    failures = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, lambda file: np.savez(file, **arrays))
            return
        except OSError as error:
            failures.append(f"{place}: {reason_of(error.__cause__ or error)}")
    warnings.warn(
        f"the index of the shards can be kept nowhere and is made anew at every start ({'; '.join(failures)})",
        stacklevel=3,
    )


def _scan_or_fault(shard: Path) -> tuple[list[str], np.ndarray] | ImageError:
    """Scan a shard, but return its fault, for all damaged shards are to be named and not the first alone."""
    try:
        return scan(shard)
    except ImageError as error:
        return error


def _make_index(root: Path, shards: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the arrays of `TarShards`: shard, offset, size, labels (if there are any), and `Names`' text and ends."""
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(lambda name: _scan_or_fault(root / name), shards))
    if faults := [part for part in parts if isinstance(part, ImageError)]:
        raise ImageError("\n".join(map(str, faults)))
    names = Names.pack(name for found, _ in parts for name in found)
    if not len(names.ends):
        raise ImageError(
            f"the shards in {root} have no images ({', '.join(EXTENSIONS)}) among their members; what follows the "
            "first dot of a member's name counts as its extension"
        )
    offset, size, labels = np.concatenate([table for _, table in parts]).T
    shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(found) for found, _ in parts])
    unlabelled = np.flatnonzero(labels < 0)
    if 0 < len(unlabelled) < len(labels):
        first = unlabelled[0]
        raise ImageError(
            f"{len(unlabelled)} of {len(labels)} images have no label, the first is "
            f"{root / shards[shard[first]]}, member {names[first]}; give all of them a .cls, or none"
        )
    index = {"shard": shard, "offset": offset, "size": size, "text": names.text, "ends": names.ends}
    if not len(unlabelled):
        index["labels"] = labels
    return {name: np.ascontiguousarray(values) for name, values in index.items()}
