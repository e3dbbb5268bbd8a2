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
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import write_images
from faults.forked import start_training
from faults.injuries import KINDS, Injury, descendants, injure, wait_for_end
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


class Campaign:
    """Trials in a folder of their own, and the whole runs that they are compared with."""

    def __init__(self, folder: Path):
        self.folder, self.images = folder, write_images(folder / "images")
        self._whole: dict[int, tuple[Path, float]] = {}

    def whole(self, ranks: int) -> tuple[Path, float]:
        """The run that nothing has happened to, and its seconds."""
        if ranks not in self._whole:
            output, begin = self.folder / f"whole-{ranks}", time.monotonic()
            code = self._command(output, ranks, workers=0).exitcode
            assert code == 0, output.with_suffix(".txt").read_text()
            self._whole[ranks] = output, time.monotonic() - begin
        return self._whole[ranks]

    def trial(self, seed: int) -> Trial:
        rng, begin = random.Random(seed), time.monotonic()
        trial = Trial(seed, ranks=rng.choice([1, 2]), workers=rng.choice([0, 1]))
        whole, seconds = self.whole(trial.ranks)
        output = self.folder / f"trial-{seed}"
        injuries = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            process = self._start(output, trial.ranks, trial.workers)
            kind = rng.choice(list(KINDS))
            injuries.append(injure(process, output, kind, rng.uniform(0, 1.1 * seconds), rng))
            trial.commands += 1
        self._finish(trial, output)
        if not trial.hand:
            self._compare(trial, output, whole, injuries)
        trial.faults = [
            {name: asdict(each)[name] for name in ("kind", "target", "seconds", "cut")} for each in injuries
        ]
        said = output.with_suffix(".txt")
        trial.traces = said.read_text(errors="replace").count("Traceback")
        if trial.bit_equal and not trial.hand and not trial.lost and not trial.traces:
            shutil.rmtree(output)
            said.unlink()
        trial.seconds = round(time.monotonic() - begin, 1)
        return trial

    def _start(self, output: Path, ranks: int, workers: int):
        output.mkdir(exist_ok=True)
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
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(fault["kind"] for fault in faults).items()))
    equal, hands = (sum(bool(trial[name]) for trial in trials) for name in ("bit_equal", "hand"))
    lost, traces = (sum(trial[name] for trial in trials) for name in ("lost", "traces"))
    cut = sum(fault["cut"] for fault in faults)
    return (
        f"{len(faults)} faults ({kinds}) in {len(trials)} runs: {equal} runs ended with the bits of one that nothing "
        f"has happened to, {hands} needed a hand, {lost} bytes were lost (besides {cut} that the faults themselves "
        f"have cut), {traces} stack traces were printed"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many more")
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
        done, seed = done + len(trial.faults), seed + 1
        marks = "" if trial.bit_equal and not trial.hand and not trial.lost else f"  {trial.hand} lost {trial.lost}"
        print(f"{done}: {', '.join(fault['kind'] for fault in trial.faults)}, {trial.seconds} s{marks}", flush=True)
    if given.keep is None:
        shutil.rmtree(folder)
    print(summary(given.record))


if __name__ == "__main__":
    main()
