"""Where the site is written: nothing of anybody else's is overwritten, and nothing half done is left."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pcl_fast.errors import UserError
from pcl_fast.files import make_folder

# It tells a site from other folders.
MARK = "made-by-pcl_fast.explore.txt"
_MARK_TEXT = "Everything in this folder was written by pcl_fast.explore, which may replace it.\n"


def check_place(output: Path, *, force: bool) -> None:
    """See whether a site may be written here.

    Raises:
        UserError: something is there that is no site, or a site and it is not to be replaced.
    """
    if not output.is_symlink() and not output.exists():
        return
    if output.is_symlink() or not output.is_dir():
        raise UserError(f"--output {output} is {'a link' if output.is_symlink() else 'a file'}; choose another place")
    if any(output.iterdir()):
        if not (output / MARK).is_file():
            raise UserError(
                f"--output {output} holds something that pcl_fast.explore has not written, and nothing of it is "
                "touched; choose another folder, which need not be there yet"
            )
        if not force:
            raise UserError(f"{output} holds a site already; choose another --output, or replace it with --force")


@contextlib.contextmanager
def written_beside(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield a new folder, which takes its place at `output` when the context ends, and is gone if it fails.

    Raises:
        UserError: see `check_place`, which is asked again at the end.
        OSError: it cannot be written.
    """
    check_place(output, force=force)
    make_folder(output.parent)
    aside = output.with_name(f"{output.name}.unfinished")
    _clear(aside)
    aside.mkdir()
    (aside / MARK).write_text(_MARK_TEXT)
    try:
        yield aside
        check_place(output, force=force)
        _swap(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _clear(aside: Path) -> None:
    """Remove what a killed process has left.

    Raises:
        UserError: it is something else.
    """
    if aside.exists():
        if not (aside / MARK).is_file():
            raise UserError(f"{aside} is in the way, where the site is written first; move it away")
        shutil.rmtree(aside)


def _swap(aside: Path, output: Path) -> None:
    """Give the new folder its name; a site that has it goes."""
    if not output.exists():
        os.replace(aside, output)
        return
    former = output.with_name(f"{output.name}.replaced")
    _clear(former)
    os.replace(output, former)
    os.replace(aside, output)
    shutil.rmtree(former)
