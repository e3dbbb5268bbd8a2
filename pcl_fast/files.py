"""Files that are either whole or not there, and what is said when the disk does not take them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

# What is asked before a file in a folder is replaced, see `guarded`.
_guards: dict[Path, Callable[[], None]] = {}
# The disk, a quota or a limit of the process leaves no room.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(
    path: Path,
    write: Callable[[BinaryIO], Any],
    *,
    also_as: Path | None = None,
    before_as: Path | None = None,
    size: int | None = None,
) -> None:
    """Let `write` fill a file that will be at `path` whole or not at all, whatever happens meanwhile: it is written
    aside, flushed to the disk, then renamed. After a fault nothing is left of it.

    Args:
        also_as: another path for the same bytes, as good as a copy. It is there before `path` is.
        before_as: where the file that has been at `path` is kept. What has been there stays until the new file is
            whole, unless the disk has no room for all three, and gets some by its end.
        size: bytes that it will have, about, if that is known; for the message.

    Raises:
        OSError: it cannot be written; a sentence with the path and, where there is no room, how much is needed.
        Whatever the folder's guard raises, see `guarded`.
    """
    aside = _aside(path)
    try:
        try:
            _fill(aside, write)
        except OSError as error:
            # A limit on a file's size, EFBIG, would be the same with more room.
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if before_as is None or not full or not path.exists() or not frees_room(before_as):
                raise
            ask_guard(path)
            before_as.unlink()
            _fill(aside, write)
        if also_as is not None:
            _duplicate(aside, also_as)
        if before_as is not None and path.exists():
            _keep(path, before_as)
        _rename(aside, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise fault_of(path, error, size) from error
    finally:
        _remove(aside)


def replace(source: Path, target: Path) -> None:
    """Give a file the name of another in its folder, which is gone then.

    Raises:
        OSError: it cannot be done; a sentence with the path.
        Whatever the folder's guard raises, see `guarded`.
    """
    try:
        _rename(source, target)
        _flush_folder(target.parent)
    except OSError as error:
        raise fault_of(target, error) from error


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it is to lie in, unless it is there.

    Raises:
        OSError: it cannot be made; a sentence with its path.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = in_the_way(error) or "; choose another place"
        raise OSError(f"the folder {folder} cannot be made: {error.strerror}{advice}") from error


@contextlib.contextmanager
def guarded(folder: Path, guard: Callable[[], None]) -> Iterator[None]:
    """In this context `guard` is called before `write_whole` gives a file of this folder its name, and may raise."""
    folder = folder.resolve()
    _guards[folder] = guard
    try:
        yield
    finally:
        _guards.pop(folder)


def ask_guard(path: Path) -> None:
    """Call the guard of the file's folder, if there is one, and let it raise."""
    if (guard := _guards.get(path.parent.resolve())) is not None:
        guard()


def fault_of(path: Path, error: OSError, size: int | None = None) -> OSError:
    """Say in a sentence that `path` could not be written, and what to do where there is no room for it."""
    # A rename or a link names its target second; what is written aside has a name of its own, which tells nobody much.
    named = Path(os.fsdecode(error.filename2 or error.filename or path))
    named = path if named.suffix == ".tmp" else named
    said = f"cannot write {named}: {error.strerror or error}{in_the_way(error)}"
    if error.errno not in _NO_ROOM:
        return OSError(said)
    takes = "" if size is None else f"it takes {in_words(size)}, and "
    free = in_words(shutil.disk_usage(path.parent).free)
    return OSError(f"{said}; {takes}{free} are free there. What was saved before stands: make room, then go on")


def in_the_way(error: OSError) -> str:
    """Say what to do where a file is in the way of a folder, or a folder in that of a file; "" for other faults."""
    what = _IN_THE_WAY.get(error.errno)
    return f"; {what}: move it away, or choose another place" if what else ""


_IN_THE_WAY = {
    errno.EEXIST: "a file is where a folder is wanted",
    errno.ENOTDIR: "a file is where a folder is wanted",
    errno.EISDIR: "a folder is where a file is wanted",
}


def in_words(size: float) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def remove_unfinished(path: Path) -> None:
    """Remove what a killed process has left of its `write_whole` to `path`. Nobody else may be writing it now."""
    for aside in path.parent.glob(f"{path.name}.*.tmp"):
        aside.unlink(missing_ok=True)


class _File(io.BufferedWriter):
    """Notes the disk's first fault: torch.save raises an error of its own, which has lost the reason."""

    fault: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.fault = self.fault or error
            raise


def _aside(path: Path) -> Path:
    # Another process may be writing the same file.
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def _fill(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a new file and flush it to the disk. After a fault it is gone, or it would not count as free."""
    try:
        with _File(io.FileIO(path, "x")) as file:
            try:
                write(file)
            except RuntimeError as error:
                raise (file.fault or error) from error
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        _remove(path)
        raise


def _duplicate(source: Path, target: Path) -> None:
    """Give the same bytes a second name, or make a copy where the file system has no links; whole or not at all."""
    aside = _aside(target)
    try:
        try:
            os.link(source, aside)
        except OSError:
            with open(source, "rb") as original:
                _fill(aside, lambda file: shutil.copyfileobj(original, file))
        _rename(aside, target)
    finally:
        _remove(aside)


def frees_room(path: Path) -> bool:
    """Whether there is a file that would be gone from the disk without this name."""
    return path.exists() and path.stat().st_nlink == 1


def _keep(path: Path, before_as: Path) -> None:
    """Give a file that is about to be replaced another name. Where the file system has no links, nothing is at `path`
    for a moment.
    """
    linked = _aside(before_as)
    try:
        os.link(path, linked)
    except OSError:
        _rename(path, before_as)
    else:
        try:
            _rename(linked, before_as)
        finally:
            _remove(linked)  # to rename a file to another of its own names does nothing


def _rename(source: Path, target: Path) -> None:
    ask_guard(target)
    os.replace(source, target)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _flush_folder(folder: Path) -> None:
    """Make a rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
