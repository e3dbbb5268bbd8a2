"""metrics.jsonl: rows of JSON, written while a run goes on and read by whoever looks at it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pcl_fast.files import ask_guard, fault_of, write_whole

FILE = "metrics.jsonl"
# The kind of the row that says what is missing before it.
GAP = "gap"


class RowFile:
    """The record while a run writes it. A row that the disk does not take waits in memory: what is in the file is
    whole, and nothing is missing between its rows.
    """

    def __init__(self, path: Path, *, keep: int = 0):
        """keep: bytes that stay; see `mend`.

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
    """All rows of a run's metrics.jsonl. Lines that are none are left out: the last may be half written yet."""
    lines = (folder / FILE).read_bytes().split(b"\n")
    return [row for row in map(_row, lines) if row is not None]


def mend(path: Path, length: int, step: int) -> tuple[int, str | None]:
    """Make a record fit for a run that is taken up from a checkpoint, whatever has become of it meanwhile.

    Lines that are no rows are taken out; the file as it was is then kept beside it.

    Args:
        path: of the record, which may be missing.
        length: bytes that it had at the checkpoint.
        step: of the checkpoint.

    Returns:
        The bytes of it that stay, for what came later is written anew; and what is missing of it, in words, or None.

    Raises:
        OSError: it cannot be read or written.
    """
    if not length:
        return 0, None
    content = path.read_bytes() if path.exists() else None
    told, before = _gap_at(content or b"", step)
    if told is not None:
        return before, told
    lines = (content or b"")[:length].split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    rows = [line + b"\n" for line in lines if _row(line) is not None]
    kept = b"".join(rows)
    if content is not None and content.startswith(kept) and len(kept) == length:
        return length, None
    if content and len(rows) < len(lines):
        write_whole(path.with_name(f"{path.name}.spoiled"), lambda file: file.write(content))
    write_whole(path, lambda file: file.write(kept))
    return len(kept), _missing(content, length, len(lines) - len(rows))


def _missing(content: bytes | None, length: int, unreadable: int) -> str:
    if content is None:
        return f"{FILE} was gone, with {length} bytes"
    parts = [f"{FILE} had {len(content)} of {length} bytes"] if len(content) < length else []
    parts += [f"{unreadable} of its lines were unreadable"] if unreadable else []
    return " and ".join(parts) or f"{FILE} was cut within a line"


def _gap_at(content: bytes, step: int) -> tuple[str | None, int]:
    """Find the row about a gap that an earlier attempt to go on from the same step has written: what it says, and
    where it begins.
    """
    begin = 0
    for line in content.split(b"\n"):
        row = _row(line)
        if row is not None and row["kind"] == GAP and row.get("step") == step:
            return str(row.get("missing")), begin
        begin += len(line) + 1
    return None, 0


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None
