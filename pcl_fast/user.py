"""The user, of whom a container may know neither name nor home."""

from __future__ import annotations

import functools
import getpass
import os
import stat
import tempfile
import warnings
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of what is kept from one run to the next; it may have to be made.

    That is pcl_fast in $XDG_CACHE_HOME or in ~/.cache. Where there is no home, or none that can be written, it is a
    folder in the temporary directory, and a warning says so once.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "pcl_fast"
    home = _home()
    folder = None if home is None else home / ".cache" / "pcl_fast"
    return folder if folder is not None and _is_writable(folder) else _temporary_folder()


def give_name_and_home() -> None:
    """Name the user and a home in the environment where there are none: PyTorch, Triton and matplotlib fail without."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid-{os.getuid()}"
    if _home() is None:
        os.environ["HOME"] = str(_temporary_folder())


def _home() -> Path | None:
    try:
        home = Path.home()
    except (RuntimeError, KeyError):
        return None
    return home if home.is_absolute() else None


def _is_writable(folder: Path) -> bool:
    """Whether the folder can be written, or made if it is not there."""
    while not os.path.exists(folder):
        folder = folder.parent
    return os.access(folder, os.W_OK)


@functools.cache
def _temporary_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"pcl_fast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):  # of somebody who expected us
        folder = Path(tempfile.mkdtemp(prefix="pcl_fast-"))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"there is no home folder that can be written; {folder} takes its place (HOME or XDG_CACHE_HOME names "
            "another)",
            stacklevel=3,
        )
    return folder
