"""Whether the disk has room for what a run will write."""

from __future__ import annotations

import shutil
from pathlib import Path

from pcl_fast.files import in_words


def check_room(folder: Path, size: int, *, kept: int, first: bool, given_up: int = 0) -> list[str]:
    """See whether a run's checkpoints fit on the disk. What else it writes is small beside them.

    Args:
        folder: exists.
        size: bytes of a checkpoint.
        kept: how many checkpoints will be kept under names of their own.
        first: whether there is none yet.
        given_up: bytes that the next one takes from the one before the last, where the disk is too full for three.

    Returns:
        A line for the log if only some of those to be kept will fit.

    Raises:
        OSError: not even the next one fits; says how much is needed and how much is free.
    """
    # The last one stands until the next is whole.
    least, free = size * (2 if first else 1), shutil.disk_usage(folder).free
    what = f"a checkpoint takes {in_words(size)}, and the disk of {folder} has {in_words(free)} free"
    if least > free + given_up:
        raise OSError(f"{what}, but {in_words(least)} are needed; make room, or choose another --output")
    if least + kept * size <= free:
        return []
    return [f"{what}: not enough for the {kept} that are to be kept; make room, or change --checkpoint.keep-every"]
