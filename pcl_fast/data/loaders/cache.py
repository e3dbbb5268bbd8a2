"""A cache on disk of the clustering view, which is the same bytes before every epoch: decoded once, then read.

Every shard is a file: a header that says in JSON what determines the crops' bytes, then the crops, one after another.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch

from pcl_fast.config import DataConfig
from pcl_fast.data.loaders.feeds import Feeds
from pcl_fast.data.sources.images import ImageSet
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.errors import UserError

# The files' version. It must be raised too when a loader comes to make other crops of the same images.
_VERSION = 1
# The header fills a page, so that the crops begin on one.
_HEADER_BYTES = 4096
# The content of so many images is compared: another copy of the data set, resized say, has the same names.
_SAMPLED = 64


@dataclass(frozen=True)
class CacheFile:
    """A cache file says where the crops of a shard lie, and which they are."""

    path: Path
    header: bytes
    images: int
    size: int

    @property
    def part(self) -> Path:
        """The path of the file while it is being written."""
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def length(self) -> int:
        """The number of bytes of the whole file."""
        return self.offset(self.images)

    def offset(self, image: int) -> int:
        """Return at which byte the crop of this image of the shard begins."""
        return len(self.header) + image * 3 * self.size**2

    def open(self) -> BinaryIO | None:
        """Open the file; return None if it is missing or not whole."""
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        except OSError:
            return None
        if os.fstat(file.fileno()).st_size == self.length and file.read(len(self.header)) == self.header:
            return file
        file.close()
        return None

    def missing_bytes(self) -> int:
        """Count the bytes that are yet to be written, less those of a part, which will be replaced or completed."""
        file = self.open()
        if file is not None:
            file.close()
            return 0
        try:
            return max(0, self.length - 512 * os.stat(self.part).st_blocks)
        except OSError:
            return self.length


class ClusteringLoader(Protocol):
    """A clustering loader makes the batches of a shard of the clustering view."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield all batches in order."""

    def batches(self, starts: Iterable[int]) -> Iterator[torch.Tensor]:
        """Yield the batches that begin at these positions of the shard, which are asked for while it works."""


class CachedView:
    """A cached view yields the batches of the clustering view: its first pass is the loader's and writes them aside,
    later ones read them. Where the disk is too slow for whoever wants them, the loader decodes some of them meanwhile.

    A batch is what the loader makes, byte for byte: uint8 [batch_size, size, size, 3] on the same device, the last one
    smaller. Where the disk fails later than at the start, a warning says so and the loader goes on alone; where the
    loader fails while it helps, a warning says so and the disk goes on alone.
    """

    def __init__(self, loader: ClusteringLoader, file: CacheFile, *, batch_size: int, gpu: torch.device | None):
        self.loader, self.file, self.batch_size, self.gpu = loader, file, batch_size, gpu
        self._failed = self._alone = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._failed:
            return iter(self.loader)
        file = self.file.open()
        return self._written() if file is None else self._read(file)

    def _written(self) -> Iterator[torch.Tensor]:
        with _Part(self.file, self._give_up) as part:
            for batch in self.loader:
                part.add(batch)
                yield batch
            part.finish()

    def _read(self, file: BinaryIO) -> Iterator[torch.Tensor]:
        starts = range(0, self.file.images, self.batch_size)
        given = 0
        try:
            for batch in self._batches(file, starts):
                yield batch
                given += 1
        except OSError as error:
            self._give_up(error)
            yield from self.loader.batches(starts[given:])

    def _batches(self, file: BinaryIO, starts: range) -> Iterator[torch.Tensor]:
        """Read all batches from the file, and decode some of them if that is too slow.

        Raises:
            OSError: the file cannot be read to its end.
        """

        def read(number: int) -> torch.Tensor:
            return self._read_batch(file, starts[number])

        def decode(numbers: Iterator[int]) -> Iterator[torch.Tensor]:
            _read_no_further(file)
            return self._decode(starts[number] for number in numbers)

        feeds = Feeds(len(starts), read, None if self._alone else decode, self._go_on_alone)
        with file, contextlib.closing(iter(feeds)) as batches:
            for batch in batches:
                if self.gpu is not None:
                    # The pinned memory that is dropped here is not used again before it has been copied, nor is what
                    # was decoded on another stream before this one is done with it.
                    batch = batch.to(self.gpu, non_blocking=True)
                    batch.record_stream(torch.cuda.current_stream(self.gpu))
                yield batch

    def _read_batch(self, file: BinaryIO, start: int) -> torch.Tensor:
        """Return a batch on the host."""
        count, size = min(self.batch_size, self.file.images - start), self.file.size
        # Without its device a thread would make itself at home on the first GPU.
        with contextlib.nullcontext() if self.gpu is None else torch.cuda.device(self.gpu):
            batch = torch.empty(count, size, size, 3, dtype=torch.uint8, pin_memory=self.gpu is not None)
        _read_into(batch.numpy(), file.fileno(), self.file.offset(start))
        return batch

    def _decode(self, starts: Iterator[int]) -> Iterator[torch.Tensor]:
        """Yield the loader's batches, in another thread than the one that encodes them.

        On a GPU they are made on a stream of their own, so that the encoder waits for none before its turn, and come
        back in memory that does not return to the loader in that stream's order.
        """
        if self.gpu is None:
            yield from self.loader.batches(starts)
            return
        stream = torch.cuda.Stream(self.gpu)
        with torch.cuda.stream(stream), contextlib.closing(self.loader.batches(starts)) as batches:
            for batch in batches:
                own = batch.clone()
                stream.synchronize()
                yield own

    def _go_on_alone(self, error: Exception) -> None:
        self._alone = True
        warnings.warn(f"--data.cache: {self.file.path} is read without the help of idle cores: {error}", stacklevel=2)

    def _give_up(self, error: OSError) -> None:
        self._failed = True
        warnings.warn(
            f"--data.cache: {self.file.path} cannot be used ({error}); the clustering view is decoded every time",
            stacklevel=2,
        )


class _Part:
    """A part is a cache file while it is written. Once whole it takes the file's name; else nothing is left of it.

    While another process writes the same file, this one does not: then, and after a fault of the disk, `add` and
    `finish` do nothing.
    """

    def __init__(self, target: CacheFile, on_fault: Callable[[OSError], None]):
        self.target, self.on_fault = target, on_fault
        self._file: BinaryIO | None = None

    def __enter__(self) -> _Part:
        with self._guarded():
            self._file = _lock(self.target.part)
            if self._file is not None:
                self._file.write(self.target.header)
        return self

    def __exit__(self, *_) -> None:
        self._drop()

    def add(self, batch: torch.Tensor) -> None:
        if self._file is not None:
            with self._guarded():
                self._file.write(batch.cpu().contiguous().numpy())

    def finish(self) -> None:
        if self._file is None or self._file.tell() != self.target.length:
            return
        with self._guarded():
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self.target.part, self.target.path)
            file, self._file = self._file, None
            file.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._drop()
            self.on_fault(error)

    def _drop(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), 0)  # a loader's process, forked meanwhile, would keep the disk full
        with contextlib.suppress(OSError):
            self.target.part.unlink()
        with contextlib.suppress(OSError):
            file.close()  # only now, because this unlocks it


def cached(
    loader: Iterable[torch.Tensor],
    images: ImageSet,
    config: DataConfig,
    world: World,
    *,
    made_by: str,
    batch_size: int,
    gpu: torch.device | None,
) -> CachedView:
    """Give a cache in the folder config.cache to a loader of the clustering view.

    Args:
        loader: makes this rank's shard.
        images: the whole data set.
        made_by: describes the loader, as far as it determines the crops' bytes.
        batch_size: images in a batch of the loader's.
        gpu: the device on which the loader's batches lie, or None for the CPU.

    Raises:
        UserError: the folder cannot be written, or has no room for the shards of this machine's ranks.
        ImageError: one of the images that are looked at to tell data sets apart cannot be read.
    """
    known = {
        "version": _VERSION,
        "images": images.fingerprint(),
        "content": _content(images),
        "resize": config.shorter_side,
        "size": config.size,
        "made_by": made_by,
    }
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first = world.rank - local_rank
    files = [
        _cache_file(config, known, *shard_bounds(len(images), rank, world.size))
        for rank in range(first, first + local_size)
    ]
    _check_folder(config.cache, sum(file.missing_bytes() for file in files))
    return CachedView(loader, files[local_rank], batch_size=batch_size, gpu=gpu)


def _cache_file(config: DataConfig, known: dict, begin: int, end: int) -> CacheFile:
    header = json.dumps({**known, "begin": begin, "end": end}, indent=1).encode().ljust(_HEADER_BYTES - 1) + b"\n"
    name = f"clustering-view-{begin}-{end}-{hashlib.sha256(header).hexdigest()[:16]}"
    return CacheFile(config.cache / name, header, end - begin, config.size)


def _content(images: ImageSet) -> str:
    """Hash some of the files, which tells apart data sets whose images have the same names."""
    digest = hashlib.sha256()
    for index in np.linspace(0, len(images) - 1, min(len(images), _SAMPLED)).astype(int).tolist():
        digest.update(hashlib.sha256(images.encoded(index)).digest())
    return digest.hexdigest()[:16]


def _check_folder(folder: Path, needed: int) -> None:
    """Make sure that `needed` bytes can be written to a folder.

    Raises:
        UserError: they cannot.
    """
    if not needed:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"--data.cache {folder} cannot be written: {error}; name another folder") from error
    if needed > free:
        raise UserError(
            f"--data.cache {folder} has {free / 1e9:.3g} GB free, but this machine's part of the clustering view takes "
            f"{needed / 1e9:.3g} GB; delete what other runs have left there, name another folder, or leave the flag out"
        )


def _lock(path: Path) -> BinaryIO | None:
    """Open an empty file that this process alone may write until it is closed; return None while another has it.

    Raises:
        OSError: the file cannot be written or locked.
    """
    with contextlib.ExitStack() as closing:
        file = closing.enter_context(os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Since it was opened here, the other may have given it its name.
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return None
        except (BlockingIOError, FileNotFoundError):
            return None
        file.truncate(0)
        closing.pop_all()
        return file


def _read_no_further(file: BinaryIO) -> None:
    """Keep the system from reading on beyond what is asked for: by megabytes, and into batches that are decoded."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # of a file system without it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)


def _read_into(array: np.ndarray, descriptor: int, offset: int) -> None:
    """Fill an array with what the file holds from `offset` on.

    Raises:
        OSError: the file cannot be read there, or ends before the array is full.
    """
    rest = memoryview(array).cast("B")
    while rest:
        count = os.preadv(descriptor, [rest], offset)
        if not count:
            raise OSError("it has become shorter")
        rest, offset = rest[count:], offset + count
