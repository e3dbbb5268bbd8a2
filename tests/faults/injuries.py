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
class Injury:
    """What was done: a kind of `KINDS`, to whom, after how many seconds, and the bytes that it cut from a file.

    missing: rows of the record that it cut.
    spoiled: names of the checkpoints that it cut; several may be the same file.
    """

    kind: str
    target: str = ""
    seconds: float = 0.0
    cut: int = 0
    missing: list[bytes] = field(default_factory=list)
    spoiled: list[str] = field(default_factory=list)


def injure(process: Process, folder: Path, kind: str, moment: float, rng: random.Random) -> Injury:
    """Let a fault happen to a run, and wait until all its processes have ended.

    Args:
        process: the one that was started; its descendants belong to it.
        folder: the run's --output.
        kind: of `KINDS`.
        moment: seconds from now.
        rng: chooses the rest.
    """
    begin, injury = time.monotonic(), Injury(kind)
    if kind == "kill while saving":
        _wait_for_save(process, folder, begin + 3 * moment)
        time.sleep(rng.uniform(0, 0.02))
    else:
        process.join(moment)
    injury.seconds = round(time.monotonic() - begin, 3)
    family = descendants(process.pid) if process.is_alive() else []
    if family:
        KINDS[kind](injury, family, folder, rng)
    process.join()
    for pid in family:
        wait_for_end(pid)
    if kind == "truncate":
        _truncate(injury, folder, rng)
    return injury


def _kill_one(injury: Injury, family: list[int], folder: Path, rng: random.Random) -> None:
    """The launcher, a rank, or a loader's process."""
    number = rng.randrange(len(family))
    injury.target = f"process {number} of {len(family)}"
    _send(family[number], signal.SIGKILL)


def _kill_all(injury: Injury, family: list[int], folder: Path, rng: random.Random) -> None:
    """As when the machine goes down."""
    for pid in family:
        _send(pid, signal.SIGKILL)


def _signal_one(injury: Injury, family: list[int], folder: Path, rng: random.Random) -> None:
    number, chosen = rng.randrange(len(family)), rng.choice(_STOPPING)
    injury.target = f"{chosen.name} to process {number} of {len(family)}"
    _send(family[number], chosen)


def _fill_disk(injury: Injury, family: list[int], folder: Path, rng: random.Random) -> None:
    """No file can become longer than this, until the processes end. The kernel tells them as it tells of a full disk,
    by another number.
    """
    largest = max((path.stat().st_size for path in folder.glob("checkpoint*")), default=1_000_000)
    size = rng.randrange(1 + int(1.2 * largest)) if rng.random() < 0.7 else rng.randrange(10_000)
    injury.target = f"{size} bytes"
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


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
    injury.spoiled = [other.name for other in folder.glob("checkpoint*.pt") if other.samefile(path)]
    os.truncate(path, left)


KINDS: dict[str, Callable[[Injury, list[int], Path, random.Random], None]] = {
    "kill a process": _kill_one,
    "kill all": _kill_all,
    "kill while saving": _kill_all,
    "signal": _signal_one,
    "full disk": _fill_disk,
    "truncate": _kill_all,
}


def _wait_for_save(process: Process, folder: Path, end: float) -> None:
    """Wait until something is being written aside."""
    while process.is_alive() and time.monotonic() < end:
        if any(name.endswith(".tmp") for name in os.listdir(folder)):
            return
        time.sleep(0.0005)


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
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
