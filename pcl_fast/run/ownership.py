"""A run's folder belongs to one process at a time, and so does a task of evaluation in its own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from pcl_fast.errors import UserError
from pcl_fast.files import guarded, make_folder, write_whole

OWNER, LOCK = "owner.json", ".lock"
# Seconds that a new owner waits for the last one: ranks whose launcher was killed take some to notice it and to save.
_PATIENCE = 30.0


@contextlib.contextmanager
def owned(folder: Path, task: str = "") -> Iterator[None]:
    """Own a folder in this context: no other process that asks can write into it, and what this one writes by
    `write_whole` it writes only while it still is the owner. With `task`, own that task in it alone: others may work in
    the same folder.

    A lock keeps other processes out, and falls with the process that holds it. As it cannot be trusted on every network
    file system, owner.json names the owner by a token too: whoever comes later and is let in writes its own, and the
    one before ends at its next file.

    Raises:
        UserError: another process owns it, and does not end within half a minute; or, when something is written, has
            taken it over. Says which process on which machine.
        OSError: the folder cannot be written.
    """
    make_folder(folder)
    claim, lock = (folder / name for name in ((f"{task}.{OWNER}", f".{task}{LOCK}") if task else (OWNER, LOCK)))
    with _locked(lock, claim):
        now = datetime.now().isoformat(" ", "seconds")
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "token": uuid.uuid4().hex}
        write_whole(claim, lambda file: file.write(json.dumps(mine).encode()))
        try:
            with guarded(folder, lambda: _check(claim, mine["token"])):
                yield
        finally:
            if _owner(claim).get("token") == mine["token"]:
                claim.unlink(missing_ok=True)


def _check(claim: Path, token: str) -> None:
    owner = _owner(claim)
    if owner.get("token", token) != token:
        raise UserError(
            f"{claim.parent} has been taken over by {_name(owner)}, a second run into the same folder; this one ends "
            "and leaves everything to it"
        )


def _owner(claim: Path) -> dict[str, Any]:
    """Return what owner.json says, or {} if nobody owns the folder."""
    try:
        owner = json.loads(claim.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


@contextlib.contextmanager
def _locked(lock: Path, claim: Path) -> Iterator[None]:
    """Hold the lock. It is a record lock, which a forked process of a loader does not inherit: it falls when
    this process ends, whoever else lives on. The file must not be opened elsewhere in this process, for to close it
    would unlock it.
    """
    folder = lock.parent
    with open(lock, "wb") as file:
        end, told = time.monotonic() + _PATIENCE, False
        while not _try_to_lock(file.fileno()):
            owner = _name(_owner(claim))
            if time.monotonic() >= end:
                raise UserError(
                    f"{folder} is in use by {owner}; stop that run first, or choose another --output for this one"
                )
            if not told:
                print(f"waiting for {owner}, which still uses {folder}", flush=True)
                told = True
            time.sleep(0.2)
        yield


def _try_to_lock(descriptor: int) -> bool:
    """Return whether the file is locked now, or cannot be on this file system; False if another process has it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
