"""The faults of the campaign: what happens to a run, at a random moment of it."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Process
from pathlib import Path

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Running:
    """A command under way.

    process: the one that was started; its descendants belong to it.
    folder: the run's --output.
    said: the file to which it prints.
    """

    process: Process
    folder: Path
    said: Path

    def family(self) -> list[int]:
        """Its processes that live."""
        return list(filter(is_alive, descendants(self.process.pid)))

    def wait(self, family: list[int]) -> None:
        """Until the command and all these processes have ended."""
        self.process.join()
        for pid in family:
            wait_for_end(pid)


@dataclass
class Injury:
    """What was done: a kind of `KINDS`, to whom, after how many seconds, and the bytes that it cut from a file.

    met: whether it happened to anything. A run may have come to its end before, or end before it writes to a full disk.
    missing: rows of the record that it cut.
    spoiled: names of the checkpoints that it cut; several may be the same file.
    """

    kind: str
    target: str = ""
    seconds: float = 0.0
    met: bool = False
    cut: int = 0
    missing: list[bytes] = field(default_factory=list)
    spoiled: list[str] = field(default_factory=list)


def injure(running: Running, kind: str, moment: float, rng: random.Random) -> Injury:
    """Let a fault happen to a run, and wait until all its processes have ended.

    Args:
        kind: of `KINDS`.
        moment: seconds from now.
        rng: chooses the rest.
    """
    begin, injury = time.monotonic(), Injury(kind)
    if kind == "kill while saving":
        injury.target = "while saving" if _wait_for_save(running, begin + 3 * moment) else "not while saving"
        time.sleep(rng.uniform(0, 0.02))
    else:
        running.process.join(moment)
    injury.seconds = round(time.monotonic() - begin, 3)
    family = running.family()
    if family:
        KINDS[kind](injury, running, family, rng)
    running.wait(family)
    return injury


def _kill_one(injury: Injury, running: Running, family: list[int], rng: random.Random) -> None:
    """The launcher, a rank, or a loader's process."""
    number = rng.randrange(len(family))
    injury.target = f"process {number} of {len(family)}"
    injury.met = _send(family[number], signal.SIGKILL)


def _kill_all(injury: Injury, running: Running, family: list[int], rng: random.Random) -> None:
    """As when the machine goes down."""
    injury.met = sum(_send(pid, signal.SIGKILL) for pid in family) > 0  # any() would stop at the first


def _signal_one(injury: Injury, running: Running, family: list[int], rng: random.Random) -> None:
    number, chosen = rng.randrange(len(family)), rng.choice(_STOPPING)
    injury.target = f"{chosen.name} to process {number} of {len(family)}"
    injury.met = _send(family[number], chosen)


def _limit_files(injury: Injury, running: Running, family: list[int], rng: random.Random) -> None:
    """No file can become longer than this, until the processes end."""
    size = rng.randrange(1 + int(1.2 * _largest(running.folder))) if rng.random() < 0.7 else rng.randrange(10_000)
    injury.target = f"{size} bytes"
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    already = len(_words(running))
    running.wait(family)
    injury.met = "File too large" in _words(running)[already:]


def _fill_disk(injury: Injury, running: Running, family: list[int], rng: random.Random) -> None:
    """Something else takes all room but so many bytes, until the processes end. The run has a small disk of its own."""
    largest, filler = _largest(running.folder), running.folder.parent / "filler"
    room, kept = rng.randrange(int(1.5 * largest)), len(_words(running))
    injury.target = f"{room} bytes left"
    before = _inode(running.folder / "checkpoint.pt")
    disk = os.statvfs(running.folder)
    with contextlib.suppress(OSError), filler.open("wb") as file:  # the run may take it first
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - room))
    running.wait(family)
    filler.unlink(missing_ok=True)
    # Where three checkpoints did not fit, a save has made room by giving up the one before the last.
    made_room = room < largest and _inode(running.folder / "checkpoint.pt") != before
    injury.met = "No space left on device" in _words(running)[kept:] or made_room


def _kill_and_truncate(injury: Injury, running: Running, family: list[int], rng: random.Random) -> None:
    _kill_all(injury, running, family, rng)
    running.wait(family)
    _truncate(injury, running.folder, rng)


def _kill_and_change(injury: Injury, running: Running, family: list[int], rng: random.Random) -> None:
    """All are killed, and some bytes of a checkpoint change, as on a disk that fails without saying so."""
    _kill_all(injury, running, family, rng)
    running.wait(family)
    files = sorted(path for path in running.folder.glob("checkpoint*.pt") if path.stat().st_size)
    if not files:
        return
    path = rng.choice(files)
    at, length = rng.randrange(path.stat().st_size), rng.choice([1, 8, 4096])
    with path.open("r+b") as file:
        file.seek(at)
        length = len(before := file.read(length))
        file.seek(at)
        file.write(bytes(byte ^ rng.randrange(1, 256) for byte in before))
    injury.target = f"{length} bytes of {path.name} from {at} on"
    injury.spoiled = _names(running.folder, path)


def _truncate(injury: Injury, folder: Path, rng: random.Random) -> None:
    """Cut one of the run's files short, most often one that it needs to go on."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size)
    needed = [path for path in files if path.name in ("checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl")]
    if not files:
        return
    path = rng.choice(needed if needed and rng.random() < 0.7 else files)
    size = path.stat().st_size
    left = rng.choice([0, size - 1, rng.randrange(size)])
    injury.target, injury.cut = f"{path.name} from {size} to {left} bytes", size - left
    if path.name == "metrics.jsonl":
        before, after = path.read_bytes().split(b"\n"), path.read_bytes()[:left].split(b"\n")[:-1]
        injury.missing = before[len(after) :]
    injury.spoiled = _names(folder, path)
    os.truncate(path, left)


def _names(folder: Path, path: Path) -> list[str]:
    """All names of a checkpoint's file."""
    return [other.name for other in folder.glob("checkpoint*.pt") if other.samefile(path)]


def _largest(folder: Path) -> int:
    """Bytes of the largest checkpoint, or of what one will take."""
    return max((path.stat().st_size for path in folder.glob("checkpoint*.pt")), default=1_000_000)


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _words(running: Running) -> str:
    return running.said.read_text(errors="replace")


KINDS: dict[str, Callable[[Injury, Running, list[int], random.Random], None]] = {
    "kill a process": _kill_one,
    "kill all": _kill_all,
    "kill while saving": _kill_all,
    "signal": _signal_one,
    "limit of a file's size": _limit_files,
    "full disk": _fill_disk,
    "truncate": _kill_and_truncate,
    "change bytes": _kill_and_change,
}


def _wait_for_save(running: Running, end: float) -> bool:
    """Wait until something is being written aside; False if nothing was."""
    while running.process.is_alive() and time.monotonic() < end:
        if any(name.endswith(".tmp") for name in os.listdir(running.folder)):
            return True
        time.sleep(0.0005)
    return False


def descendants(process: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
    found = [process]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def wait_for_end(process: int, patience: float = 90.0) -> bool:
    """Wait until a process that may be another's child has ended; False if it does not."""
    end = time.monotonic() + patience
    while is_alive(process):
        if time.monotonic() >= end:
            return False
        time.sleep(0.01)
    return True


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended may still be listed."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _send(process: int, number: int) -> bool:
    """Send a signal; whether there was somebody to get it."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True
