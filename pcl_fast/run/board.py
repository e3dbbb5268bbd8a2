"""TensorBoard's events: a second copy of the record's numbers, for the sake of which no run ends."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class Board:
    """Writes scalars for TensorBoard; after a fault of the disk it says so once and does nothing more.

    Not torch's SummaryWriter, which writes in a thread of its own: there a fault prints a trace, and comes up later.
    """

    def __init__(self, folder: Path, *, purge_step: int, say: Callable[[str], None]):
        """purge_step: TensorBoard forgets what earlier processes wrote from this step on."""
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._path, self._say, self._writer = folder / name, say, None
        try:
            self._writer = RecordWriter(open(self._path, "ab"))  # noqa: SIM115
        except OSError as error:
            self._give_up(error)
        self._write(step=purge_step, file_version="brain.Event:2")
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        """Write a number; characters of its name that TensorBoard has no use for become underscores."""
        tag = re.sub(r"[^-/\w.]", "_", name)
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        self._try(lambda writer: writer.close())
        self._writer = None

    def _write(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields)
        self._try(lambda writer: writer.write(event.SerializeToString()))

    def _try(self, work: Callable[[RecordWriter], None]) -> None:
        if self._writer is not None:
            try:
                work(self._writer)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        reason = error.strerror or error
        self._say(f"TensorBoard gets no more of this run ({self._path}: {reason}); metrics.jsonl has everything")
