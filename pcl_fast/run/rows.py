"""metrics.jsonl: rows of JSON, written while a run goes on and read by whoever looks at it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pcl_fast.files import ask_guard, fault_of

FILE = "metrics.jsonl"


class RowFile:
    """The record while a run writes it. A row that the disk does not take waits in memory: what is in the file is
    whole, and nothing is missing between its rows.
    """

    def __init__(self, path: Path, *, keep: int = 0):
        """keep: bytes that stay; a run that is taken up writes anew what came later.

        Raises:
            OSError: it cannot be written.
        """
        self.path = path
        self._waiting = b""
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._file.truncate(keep)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row now, or later if the disk does not take it: `sync` complains about that."""
        self._waiting += json.dumps(row).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._write()

    def sync(self) -> int:
        """Make everything so far durable; return the bytes of the file.

        Raises:
            OSError: the disk does not take it; a sentence with the path.
            UserError: another process has taken over the folder.
        """
        ask_guard(self.path)
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise fault_of(self.path, error, len(self._waiting)) from error
        return self._length()

    def close(self) -> None:
        with contextlib.suppress(OSError), self._file:
            self._write()

    def _write(self) -> None:
        before, rest = self._length(), memoryview(self._waiting)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(before)
            raise
        self._waiting = b""

    def _length(self) -> int:
        return os.fstat(self._file.fileno()).st_size


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl."""
    with open(folder / FILE, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
