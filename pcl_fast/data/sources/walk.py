"""Walking through a folder of images: nothing is left out in silence, and nothing is found twice."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from pcl_fast.data.sources.images import reason_of
from pcl_fast.errors import ImageError

# Folders of the system, which root alone may look into, at the top of a disk.
_OF_THE_SYSTEM = ("lost+found",)


def files_below(root: Path, apart_from: Path | None = None) -> Iterator[str]:
    """Yield the paths, relative to root, of all files in a folder and in those below it, in no order.

    Links to folders are followed after all folders that are really there have been seen. One that leads to a folder
    that was seen already, or to one in which root lies, is not followed, and a warning says so.

    Args:
        root: the folder.
        apart_from: a folder, there already or not, that must not lie below root, nor below a folder that a link leads
            to: an --output, whose pictures would be taken for images.

    Raises:
        ImageError: a folder cannot be looked into, or a link to one cannot be followed; names it. Or `apart_from` lies
            among the images.
    """
    _check_apart(apart_from, root, root)
    seen = {_identity(folder) for folder in root.resolve().parents}
    # Links are taken in an order that is the same on every machine.
    folders, links, again, linked = [""], [], [], False
    while folders or links:
        linked = linked or not folders
        path = folders.pop() if folders else links.pop(0)
        identity = _identity(root / path)
        # Without links nothing comes twice, whatever a file system has for identities.
        if linked and identity in seen:
            again.append(path)
            continue
        if linked:
            _check_apart(apart_from, root / path, root)
        seen.add(identity)
        for entry in _entries(root / path):
            below = f"{path}/{entry.name}" if path else entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(below)
            else:
                yield below
    if again:
        warnings.warn(
            f"{len(again)} links lead to folders that are looked at anyway, and are not followed; the first is "
            f"{root / again[0]}",
            stacklevel=2,
        )


def _check_apart(output: Path | None, folder: Path, root: Path) -> None:
    if output is None or not output.resolve().is_relative_to(folder.resolve()):
        return
    through = "" if folder == root else f", by the link {folder}"
    raise ImageError(
        f"--output {output} lies inside --data {root}{through}, so that its pictures would be images the next time; "
        "choose another --output, and move away what is there already"
    )


def _identity(folder: Path) -> tuple[int, int]:
    try:
        stat = os.stat(folder)
    except OSError as error:
        raise _fault(folder, error) from error
    return stat.st_dev, stat.st_ino


def _entries(folder: Path) -> list[os.DirEntry]:
    """Return what is in a folder, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        if folder.name in _OF_THE_SYSTEM:
            return []
        raise _fault(folder, error) from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        if entry.is_symlink() and "." not in entry.name:
            os.stat(entry.path)  # is_dir calls a link to nowhere a file; without an extension it is meant for a folder
        return entry.is_dir()
    except OSError as error:  # a link may lead to itself, too, or through a folder that is closed
        raise _fault(entry.path, error) from error


def _fault(path: str | Path, error: OSError) -> ImageError:
    return ImageError(
        f"cannot look into the folder {path}: {reason_of(error)}; its images would be left out. Make it readable, or "
        "move it away"
    )
