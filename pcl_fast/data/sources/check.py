"""Finding images that cannot be decoded, and leaving them out."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pcl_fast.data.sources.images import ImageSet, open_image, reason_of
from pcl_fast.distributed import World, all_or_none, gather_objects, shard_bounds
from pcl_fast.errors import ImageError
from pcl_fast.files import make_folder, write_whole

# Opening a file's header costs about 0.1 ms on a local disk and some milliseconds on a network one, so that nobody
# notices when so many are checked before training.
_HEADERS_CHECKED = 20_000
# A thread is given so many images at a time: few enough to bound what is under way, enough that threads which wait for
# the slowest image cost nothing.
_TURN = 64


def find_broken(
    images: ImageSet,
    indices: Sequence[int] | None = None,
    *,
    threads: int,
    progress: Callable[[int], None] | None = None,
    unreadable: bool = True,
) -> dict[int, str]:
    """Decode images completely.

    Args:
        images: any data set.
        indices: the images to decode; None decodes all of them.
        threads: how many decode at once.
        progress: is told from time to time how many images have been decoded so far.
        unreadable: count images as broken that are there, but that the system fails to read this time.

    Returns:
        Index and reason of each image that cannot be decoded, in the order of `indices`.

    Raises:
        ValueError: less than one thread.
        ImageError: an image cannot be read this time, and is not to be counted as broken; names it.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    indices = range(len(images)) if indices is None else indices
    broken: dict[int, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(indices), _TURN * threads):
            turn = indices[begin : begin + _TURN * threads]
            faults = pool.map(lambda index: _fault(images, index, unreadable), turn)
            broken.update((int(index), fault) for index, fault in zip(turn, faults, strict=True) if fault)
            if progress is not None:
                progress(begin + len(turn))
    return broken


def _fault(images: ImageSet, index: int, unreadable: bool) -> str | None:
    try:
        images.read(index)
    except ImageError as error:
        code = getattr(error.__cause__, "errno", None)  # the system's; PIL's own errors have none
        if code not in (None, errno.ENOENT) and not unreadable:
            raise
        return reason_of(error.__cause__)
    return None


def check_headers(images: ImageSet, rank: int = 0, size: int = 1) -> list[str]:
    """Open the header of every image, or of some 20,000 evenly spaced ones of a larger set; each rank does its share.

    Returns:
        Lines about what may not be meant so: that some images can be transparent, which is passed over.

    Raises:
        ImageError: some of them are no images; names the first.
    """
    step = max(1, len(images) // _HEADERS_CHECKED)
    indices = range(0, len(images), step)[rank::size]
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda index: _header(images, index), indices))
    if broken := [fault for fault, _ in headers if fault]:
        raise ImageError(f"{len(broken)} of {len(indices)} files looked at are no images, the first is {broken[0]}")
    if transparent := sum(found for _, found in headers):
        return [
            f"warning: {transparent} of {len(indices)} files looked at say how transparent their pixels are. That is "
            "passed over, and what is hidden becomes visible; lay such images on a ground first (docs/training.md)"
        ]
    return []


def _header(images: ImageSet, index: int) -> tuple[str | None, bool]:
    """Return what is wrong with a file, and whether its pixels can be transparent."""
    try:
        with images.open(index) as file, open_image(file) as image:
            return None, image.has_transparency_data
    except Exception as error:  # PIL's plugins raise whatever their parsers run into
        return f"{images.name(index)}: {reason_of(error)}", False


def usable(images: ImageSet, record: Path, world: World, *, threads: int) -> tuple[ImageSet, int]:
    """Leave out the images that cannot be decoded. All ranks must call this; each decodes its share of the data set.

    Args:
        images: the whole data set, the same on all ranks.
        record: JSON file that keeps what was found. If it is of this data set already nothing is decoded again, so that
            the indices of a run stay the same when it goes on.
        world: the ranks.
        threads: how many decode at once on each rank.

    Returns:
        (the images that can be decoded, how many were left out)

    Raises:
        ImageError: none can be decoded, or one cannot be read for the moment, which is no reason to leave it out.
    """
    # What one rank reads counts for all: on a network disk the others may not see the file yet.
    broken = gather_objects(_read_record(record, images) if world.is_main else None, world)[0]
    if broken is None:
        share = range(*shard_bounds(len(images), world.rank, world.size))
        faults: dict[int, str] = {}
        found = all_or_none(lambda: find_broken(images, share, threads=threads, unreadable=False), world)
        for part in gather_objects(found, world):
            faults.update(part)
        if len(faults) == len(images):
            raise ImageError(
                f"none of the {len(images)} images can be decoded, the first is {images.name(0)}: {faults[0]}"
            )
        keys = images.keys()
        broken = {keys[index]: fault for index, fault in faults.items()}
        all_or_none(lambda: _write_record(record, images, broken) if world.is_main else None, world)
    if not broken:
        return images, 0
    kept = [index for index, key in enumerate(images.keys()) if key not in broken]
    return images.subset(kept), len(images) - len(kept)


def _write_record(record: Path, images: ImageSet, broken: dict[str, str]) -> None:
    text = json.dumps({"data": images.fingerprint(), "broken": broken}, indent=2) + "\n"
    make_folder(record.parent)
    write_whole(record, lambda file: file.write(text.encode()))


def _read_record(record: Path, images: ImageSet) -> dict[str, str] | None:
    """Return {key of a broken image: reason}, or None if `record` is missing, spoiled or of other images."""
    try:
        found = json.loads(record.read_bytes())
        return dict(found["broken"]) if found["data"] == images.fingerprint() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
