"""Files of PyTorch: read without running code that they bring, and not if the disk has damaged them."""

from __future__ import annotations

import errno
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pcl_fast.errors import CheckpointError, DamagedError

_ZIP = b"PK"  # it begins so; zipfile.is_zipfile goes by its end, which may be cut off
_PARTLY = "damaged, or only a part"


def read_torch(file: Path) -> Any:
    """Return what a file of PyTorch holds, tensors and plain values, on the CPU.

    PyTorch writes a zip with a checksum of every tensor, and does not look at them when it reads. This looks, which
    takes about half of the time that reading takes. Files of PyTorch before 1.6 have none.

    Raises:
        DamagedError: it is empty, cut short, or has other bytes than were written; names the file and what is wrong.
        CheckpointError: it holds something else than tensors and plain values (its cause is an UnpicklingError then),
            or cannot be opened.
    """
    try:
        if fault := find_damage(file):
            raise DamagedError(f"{file} is no readable checkpoint: {fault}")
        return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        kind, fault = _fault(file, error)
        raise kind(f"{file} is no readable checkpoint: {fault}") from error


def find_damage(file: Path) -> str | None:
    """Say what is wrong with a file of PyTorch, as far as can be told without reading its tensors; None if nothing is.

    Raises:
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    if not size:
        return "it is empty"
    with open(file, "rb") as content:
        begin = content.read(2)
        if begin != _ZIP:
            return None if begin[:1] == pickle.PROTO else f"its {size} bytes are not a file of PyTorch"
        try:
            spoiled = _spoiled_member(content, size)
        except (OSError, MemoryError):
            raise
        except Exception:  # zipfile and zlib have many names for what they find
            return f"its {size} bytes are {_PARTLY}"
    return spoiled and f"its {size} bytes are damaged: those of {spoiled} are not what was written"


def _spoiled_member(content: BinaryIO, size: int) -> str | None:
    """Return the first member of a zip whose bytes have another checksum than it names."""
    with zipfile.ZipFile(content) as opened:
        members = opened.infolist()
        # PyTorch compresses nothing. A member that says it is longer than the file would be unpacked for hours; and one
        # that says it is a folder, by this bit of MS-DOS, PyTorch takes for empty memory.
        if sum(member.file_size for member in members) > size or any(member.external_attr & 16 for member in members):
            return "its table of contents"
        # torch.serialization.set_crc32_options(False) leaves out all of them.
        return opened.testzip() if any(member.CRC for member in members) else None


def _fault(file: Path, error: Exception) -> tuple[type[CheckpointError], str]:
    """Say why PyTorch does not read a file; its own messages take ten lines, and advise to run what is in there."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return CheckpointError, error.strerror or str(error)
    if isinstance(error, pickle.UnpicklingError):
        return CheckpointError, "it holds more than tensors and plain values, which is not read since it could run code"
    return DamagedError, f"its {file.stat().st_size} bytes are {_PARTLY}"
