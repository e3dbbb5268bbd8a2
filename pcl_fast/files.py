"""Files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any], *, also_as: Path | None = None) -> None:
    """Let `write` fill a file that will be at `path` whole or not at all, whatever happens meanwhile: it is written
    aside, flushed to the disk, then renamed.

    Args:
        also_as: another path for the same bytes, as good as a copy. It is there before `path` is.

    Raises:
        OSError: it cannot be written.
    """
    # Another run may be writing the same file.
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if also_as is not None:
            _duplicate(aside, also_as)
        os.replace(aside, path)
        _flush_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a killed process has left of its `write_whole` to `path`. Nobody else may be writing it now."""
    for aside in path.parent.glob(f"{path.name}.*.tmp"):
        aside.unlink(missing_ok=True)


def _duplicate(source: Path, target: Path) -> None:
    """A second name for the same bytes, or a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make a rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
