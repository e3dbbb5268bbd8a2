"""Injure small runs at random, let the same command go on, and see whether anything is lost.

    python tests/faults/campaign.py --faults 200 --record campaign.jsonl
    python tests/faults/campaign.py --faults 0 --record campaign.jsonl

A trial trains on 53 images, on one rank or on two, with one fault or several in a row. Every fault is followed by the
same command, until the run is complete; then all that it has learned, its record and its kept checkpoints are compared
with those of a run that nothing has happened to. A line for every trial is appended to the record, so that campaigns
add up; the sums of all of them are printed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from class_folders import write_images
from faults.forked import start_training
from faults.injuries import KINDS, Injury, Running, descendants, injure, wait_for_end
from launches import FLAGS, same, same_state

from pcl_fast.errors import UserError
from pcl_fast.run.checkpoint import kept_checkpoints, load_checkpoint
from pcl_fast.run.metrics import read_rows

# Not longer than this for one command: it waits half a minute for a folder, and launchers as long for ranks.
_PATIENCE = 150.0
_ATTEMPTS = 4
_MORE = ("--checkpoint.keep-every", "1", "--checkpoint.every-minutes", "0.001", "--data.loader", "torchvision")


@dataclass
class Trial:
    """What happened. lost: bytes of the record's rows and of kept checkpoints that are not there in the end, without
    those that a fault itself has cut. hand: why a person would have been needed, or "".
    """

    seed: int
    ranks: int
    workers: int
    faults: list[dict[str, Any]] = field(default_factory=list)
    commands: int = 0
    bit_equal: bool = False
    hand: str = ""
    lost: int = 0
    traces: int = 0
    seconds: float = 0.0

    @property
    def is_well(self) -> bool:
        """Whether nothing was lost, and nobody would have had to do anything."""
        return self.bit_equal and not self.hand and not self.lost and not self.traces


class Campaign:
    """Trials in a folder of their own, and the whole runs that they are compared with."""

    def __init__(self, folder: Path):
        self.folder, self.images = folder, write_images(folder / "images")
        self.kinds = [kind for kind in KINDS if kind != "full disk" or may_mount(folder / "probe")]
        self._whole: dict[int, tuple[Path, float]] = {}

    def whole(self, ranks: int) -> tuple[Path, float]:
        """The run that nothing has happened to, and its seconds."""
        if ranks not in self._whole:
            output, begin = self.folder / f"whole-{ranks}", time.monotonic()
            output.mkdir()
            code = self._command(output, ranks, workers=0).exitcode
            assert code == 0, output.with_suffix(".txt").read_text()
            self._whole[ranks] = output, time.monotonic() - begin
        return self._whole[ranks]

    def trial(self, seed: int) -> Trial:
        rng, begin = random.Random(seed), time.monotonic()
        trial = Trial(seed, ranks=rng.choice([1, 2]), workers=rng.choice([0, 1]))
        whole, seconds = self.whole(trial.ranks)
        kinds = rng.choices(self.kinds, k=rng.choice([1, 1, 2, 3]))
        place = self.folder / f"trial-{seed}"
        with small_disk(place) if "full disk" in kinds else contextlib.nullcontext():
            output = place / "run"
            output.mkdir(parents=True)
            injuries = []
            for number, kind in enumerate(kinds):
                process = self._start(output, trial.ranks, trial.workers)
                # What goes on has less left to do.
                moment = rng.uniform(0, seconds if number == 0 else 0.6 * seconds)
                injuries.append(injure(Running(process, output, output.with_suffix(".txt")), kind, moment, rng))
                trial.commands += 1
            self._finish(trial, output)
            if not trial.hand:
                self._compare(trial, output, whole, injuries)
            names = ("kind", "target", "seconds", "met", "cut")
            trial.faults = [{name: asdict(each)[name] for name in names} for each in injuries]
            trial.traces = output.with_suffix(".txt").read_text(errors="replace").count("Traceback")
            if not trial.is_well:
                shutil.copytree(place, self.folder / f"bad-{seed}")
        shutil.rmtree(place)
        trial.seconds = round(time.monotonic() - begin, 1)
        return trial

    def _start(self, output: Path, ranks: int, workers: int):
        flags = ("--data", str(self.images), "--output", str(output), *FLAGS, *_MORE, "--data.workers", str(workers))
        return start_training(["demo", *flags], ranks=ranks, said=output.with_suffix(".txt"))

    def _command(self, output: Path, ranks: int, workers: int):
        """The command, from its beginning to its end."""
        process = self._start(output, ranks, workers)
        process.join(_PATIENCE)
        for pid in descendants(process.pid) if process.is_alive() else []:
            os.kill(pid, 9)
            wait_for_end(pid)
        process.join()
        return process

    def _finish(self, trial: Trial, output: Path) -> None:
        """Give the same command until it has nothing left to do."""
        for _ in range(_ATTEMPTS):
            trial.commands += 1
            code = self._command(output, trial.ranks, trial.workers).exitcode
            if code == 0 and (state := _state(output)) is not None and state["finished"]:
                return
        last = output.with_suffix(".txt").read_text(errors="replace").strip().splitlines()[-1]
        trial.hand = f"exit code {code}: {last}"

    def _compare(self, trial: Trial, output: Path, whole: Path, injuries: list[Injury]) -> None:
        try:
            same_state(whole, output)
            trial.bit_equal = True
        except AssertionError as error:
            trial.hand = f"other bits: {error}"
        cut = Counter(row for each in injuries for row in map(_row_of, each.missing) if row)
        missing = Counter(map(_identity, read_rows(whole))) - Counter(map(_identity, read_rows(output)))
        trial.lost += sum(len(row) * count for row, count in (missing - cut).items())
        spoiled = {name for each in injuries for name in each.spoiled}
        for path in kept_checkpoints(whole)[:-1]:
            if path.name not in spoiled and not _same_file(path, output / path.name):
                trial.lost += path.stat().st_size


# A file system in memory, which a fault can fill up. A run and its record take a fifth of it.
_SMALL_DISK = "24m"


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """Mount one at a new folder, which is a plain one again afterwards."""
    place.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_SMALL_DISK}", "tmpfs", place], check=True, capture_output=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def may_mount(place: Path) -> bool:
    """Whether this user may, as root may. If not, a campaign has no full disks."""
    try:
        with small_disk(place):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        return load_checkpoint(folder)
    except UserError:
        return None


def _same_file(path: Path, other: Path) -> bool:
    if not other.exists():
        return False
    try:
        same(*(torch.load(each, weights_only=True)["method"] for each in (path, other)), path.name)
    except (AssertionError, RuntimeError):
        return False
    return True


def _identity(row: dict[str, Any]) -> str:
    """What two runs' rows must have in common: all but times. An epoch's numbers are means, see `same_rows`."""
    return json.dumps([row["kind"], row["step"], row.get("k"), row.get("loss")])


def _row_of(line: bytes) -> str | None:
    try:
        return _identity(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return None


def summary(record: Path) -> str:
    """The sums of all campaigns in a record."""
    trials = [json.loads(line) for line in record.read_text().splitlines()]
    faults = [fault for trial in trials for fault in trial["faults"]]
    met = [fault for fault in faults if fault["met"]]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(fault["kind"] for fault in met).items()))
    equal, hands = (sum(bool(trial[name]) for trial in trials) for name in ("bit_equal", "hand"))
    lost, traces = (sum(trial[name] for trial in trials) for name in ("lost", "traces"))
    cut = sum(fault["cut"] for fault in faults)
    return (
        f"{len(met)} faults ({kinds}) met {len(trials)} runs, {len(faults) - len(met)} more met nothing: {equal} runs"
        f" ended with the bits of one that nothing has happened to, {hands} needed a hand, {lost} bytes were lost "
        f"(besides {cut} that the faults themselves have cut), {traces} stack traces were printed"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many more that meet a run")
    parser.add_argument("--seed", type=int, help="of the first trial; by default one that nobody has had")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--keep", type=Path, help="a folder for the runs that did not end well")
    given = parser.parse_args()
    torch.set_num_threads(1)  # bits are equal with one thread, and a process without others can fork
    gc.freeze()
    seed = time.time_ns() // 1000 if given.seed is None else given.seed
    folder = Path(tempfile.mkdtemp(prefix="campaign-", dir=given.keep))
    campaign, done = Campaign(folder), 0
    while done < given.faults:
        trial = campaign.trial(seed)
        with given.record.open("a") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
        done, seed = done + sum(fault["met"] for fault in trial.faults), seed + 1
        marks = "" if trial.is_well else f"  NOT WELL: {trial.hand} lost {trial.lost} traces {trial.traces}"
        kinds = ", ".join(fault["kind"] + ("" if fault["met"] else " (nothing met)") for fault in trial.faults)
        print(f"{done}: {kinds}, {trial.seconds} s{marks}", flush=True)
    if given.keep is None:
        shutil.rmtree(folder)
    print(summary(given.record))


if __name__ == "__main__":
    main()
