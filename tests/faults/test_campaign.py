"""The campaign of random faults works, and notices what is lost. What it has found is in docs/reliability.md."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults.campaign import Campaign, Trial, summary
from faults.injuries import KINDS, Injury, Running, injure
from faults.tiny import tiny
from launches import on_the_cpu

from pcl_fast.distributed import World
from pcl_fast.errors import DamagedError
from pcl_fast.run.checkpoint import load_checkpoint, save_checkpoint
from pcl_fast.train import run


@pytest.mark.slow
def test_a_campaign(tmp_path):
    record = tmp_path / "record.jsonl"
    script = Path(__file__).parent / "campaign.py"
    line = [sys.executable, str(script), "--faults", "4", "--seed", "6", "--record", str(record)]
    done = subprocess.run(line, env=on_the_cpu(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    trials = [json.loads(line) for line in record.read_text().splitlines()]
    faults = sum(len(trial["faults"]) for trial in trials)
    assert faults >= 4
    assert all(trial["bit_equal"] for trial in trials)
    assert f"{len(trials)} runs ended with the bits" in done.stdout
    assert "0 needed a hand, 0 bytes were lost" in done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp("whole")
    run(tiny(image_folder, folder, checkpoint__keep_every=1), World(0, 1, torch.device("cpu"), None))
    return folder


def lose_a_row(folder: Path) -> None:
    rows = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(rows[:1] + rows[2:]))


def lose_a_kept_checkpoint(folder: Path) -> None:
    (folder / "checkpoint-0001.pt").unlink()


def spoil_a_kept_checkpoint(folder: Path) -> None:
    state = torch.load(folder / "checkpoint-0001.pt", weights_only=True)
    next(value for value in state["method"].values() if isinstance(value, torch.Tensor)).add_(1)
    torch.save(state, folder / "checkpoint-0001.pt")


def learn_something_else(folder: Path) -> None:
    state = load_checkpoint(folder)
    next(value for value in state["method"].values() if isinstance(value, torch.Tensor)).add_(1)
    save_checkpoint(folder, state)


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda folder: None, (True, False, False)),
        (lose_a_row, (True, False, True)),
        (lose_a_kept_checkpoint, (True, False, True)),
        (spoil_a_kept_checkpoint, (True, False, True)),
        (learn_something_else, (False, True, False)),
    ],
)
def test_it_notices(whole, tmp_path, harm, found):
    """found: whether bits are equal, a hand was needed, something is lost."""
    copied = shutil.copytree(whole, tmp_path / "copied")
    harm(copied)
    trial = Trial(seed=0, ranks=1, workers=0)
    Campaign(tmp_path)._compare(trial, copied, whole, [])
    assert (trial.bit_equal, bool(trial.hand), trial.lost > 0) == found


def test_what_a_fault_has_cut_is_not_lost_by_us(whole, tmp_path):
    copied = shutil.copytree(whole, tmp_path / "copied")
    row = (whole / "metrics.jsonl").read_bytes().splitlines()[1]
    lose_a_row(copied)
    lose_a_kept_checkpoint(copied)
    trial, cut = Trial(seed=0, ranks=1, workers=0), Injury("truncate", missing=[row], spoiled=["checkpoint-0001.pt"])
    Campaign(tmp_path)._compare(trial, copied, whole, [cut])
    assert (trial.bit_equal, trial.hand, trial.lost) == (True, "", 0)


def test_campaigns_add_up(tmp_path):
    fault = {"kind": "kill all", "target": "", "seconds": 1.0, "met": True, "cut": 0}
    missed = {**fault, "kind": "signal", "met": False}
    good = {"faults": [fault, fault, missed], "bit_equal": True, "hand": "", "lost": 0, "traces": 0}
    bad = {"faults": [{**fault, "cut": 7}], "bit_equal": False, "hand": "exit code 1", "lost": 5, "traces": 1}
    (tmp_path / "record").write_text("".join(json.dumps(each) + "\n" for each in (good, bad, good)))
    said = summary(tmp_path / "record")
    assert said.startswith("5 faults (5 kill all) met 3 runs, 2 more met nothing: 2 runs ended with the bits")
    assert said.endswith("1 needed a hand, 5 bytes were lost (besides 7 that the faults themselves have cut), "
                         "1 stack traces were printed")  # fmt: skip


@pytest.fixture
def running(tmp_path):
    """A run that saves two checkpoints of 20 kB, then as soon as it can, and says what it is asked to say."""
    folder, said = tmp_path / "run", tmp_path / "run.txt"
    folder.mkdir()
    said.write_text("")
    for epoch in (1, 2):
        save_checkpoint(folder, {"epoch": epoch, "weights": torch.zeros(5000)})

    def start(text: str, *, seconds: float = 1.0) -> Running:
        work = f"import time; time.sleep({seconds}); print({text!r}, flush=True)"
        line = [sys.executable, "-c", work]
        process = multiprocessing.get_context("fork").Process(target=print_into, args=(said, line))
        process.start()
        return Running(process, folder, said)

    return start


def print_into(file: Path, line: list[str]) -> None:
    with file.open("a") as out:
        subprocess.run(line, stdout=out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_comes_after_the_end_has_met_nothing(running, kind):
    injury = injure(running("done", seconds=0), kind, 5.0, random.Random(0))
    assert not injury.met
    assert (injury.target, injury.spoiled) == ("not while saving" if kind == "kill while saving" else "", [])


@pytest.mark.parametrize("kind", ["kill a process", "kill all", "signal", "truncate", "change bytes"])
def test_a_fault_that_ends_a_process_has_met_it(running, kind):
    assert injure(running("done", seconds=3), kind, 0.2, random.Random(1)).met


@pytest.mark.parametrize("said", ["no trouble", "cannot write x: File too large"])
def test_a_limit_that_no_file_comes_to_has_met_nothing(running, said):
    injury = injure(running(said, seconds=0.5), "limit of a file's size", 0.1, random.Random(1))
    assert injury.met == ("large" in said)


def test_bytes_that_a_fault_changes_are_noticed(running):
    injury = injure(running("done", seconds=3), "change bytes", 0.1, random.Random(3))
    (name,) = injury.spoiled
    with pytest.raises(DamagedError):
        load_checkpoint(running("").folder / name)
