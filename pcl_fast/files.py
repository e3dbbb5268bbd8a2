"""Files that are either whole or not there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file that will be at `path` whole or not at all, whatever happens meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # another run may be writing the same file
    try:
        with open(aside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
