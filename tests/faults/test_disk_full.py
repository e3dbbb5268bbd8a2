"""A disk that is full: a sentence with the path and the bytes, nothing half written, and what was saved stands."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults.tiny import no_file_beyond, tiny
from launches import command, execute, same_rows, same_state
from ranks import run_ranks
from steps import learner_of, small_config

from pcl_fast.distributed import World
from pcl_fast.methods import Metric
from pcl_fast.run.board import Board
from pcl_fast.run.checkpoint import load_checkpoint, save_checkpoint
from pcl_fast.run.report import write_report
from pcl_fast.run.room import check_room
from pcl_fast.run.rows import RowFile, read_rows
from pcl_fast.run.saving import Progress, Saver
from pcl_fast.train import run

LARGE = {"weights": torch.zeros(500_000)}  # 2 MB
RECORD = {"global_step": 3, "metrics_length": 70, "epoch_metrics": {}}


def test_a_checkpoint_that_does_not_fit_is_a_sentence_and_the_old_one_stands(tmp_path):
    save_checkpoint(tmp_path, {"epoch": 1})
    path = re.escape(str(tmp_path / "checkpoint.pt"))
    said = (
        rf"cannot write {path}: File too large; it takes 2\.00 MB, and .* are free there\. What was saved before stands"
    )
    with no_file_beyond(300_000), pytest.raises(OSError, match=said):
        save_checkpoint(tmp_path, {"epoch": 2, **LARGE}, keep_as="checkpoint-0002.pt")
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert load_checkpoint(tmp_path)["epoch"] == 1


def test_a_kept_checkpoint_is_never_half_a_copy(tmp_path, monkeypatch):
    """Where the file system has no links it is copied, and the disk may be full in the midst of that."""

    def no_links(*_):
        raise PermissionError("no links here")

    def half(source, target):
        target.write(source.read(1000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", no_links)
    save_checkpoint(tmp_path, {"epoch": 1}, keep_as="kept.pt")
    monkeypatch.setattr(shutil, "copyfileobj", half)
    with pytest.raises(OSError, match=r"checkpoint\.pt: No space left on device"):
        save_checkpoint(tmp_path, {"epoch": 2}, keep_as="kept.pt")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "kept.pt"]
    assert torch.load(tmp_path / "kept.pt", weights_only=True)["epoch"] == 1
    assert load_checkpoint(tmp_path)["epoch"] == 1


def save_on_a_full_disk(world: World, folder: Path) -> str:
    config = small_config(output=folder)
    learner, saver = learner_of(config, world), Saver(config, "these images", world)
    with no_file_beyond(10_000 if world.is_main else 10**9), pytest.raises(OSError, match="File too large") as raised:
        saver.save(learner, Progress(0, 3), RECORD)
    return str(raised.value)


def test_all_ranks_end_though_one_alone_writes(tmp_path):
    said = run_ranks(2, save_on_a_full_disk, tmp_path)
    assert said[0] == said[1]
    assert "cannot write" in said[0]
    assert os.listdir(tmp_path) == []


def test_rows_wait_for_room(tmp_path):
    """None is lost, and none is half in the file."""
    path = tmp_path / "metrics.jsonl"
    file, rows = RowFile(path), [{"kind": "step", "step": number, "loss": "x" * 100} for number in range(9)]
    with no_file_beyond(400):
        for row in rows:
            file.append(row)
        assert read_rows(tmp_path) == rows[:2]
        with pytest.raises(OSError, match=rf"cannot write {re.escape(str(path))}: File too large; it takes .* MB"):
            file.sync()
    assert file.sync() == path.stat().st_size
    file.close()
    assert read_rows(tmp_path) == rows


def test_tensorboard_s_fault_is_said_once_and_ends_nothing(tmp_path):
    said: list[str] = []
    with no_file_beyond(1000):
        board = Board(tmp_path, purge_step=0, say=said.append)
        for step in range(1000):
            board.add("epoch/loss", 1.0, step)
        board.flush()
    board.close()
    assert len(said) == 1
    assert re.search(r"TensorBoard .*events\.out.*: File too large.*metrics\.jsonl has everything", said[0])


def test_the_report_is_whole_or_the_old_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "report.png").write_text("old")
    with no_file_beyond(1000), pytest.raises(OSError, match=r"cannot write .*report\.png: File too large"):
        write_report(tmp_path, {"loss": Metric("sum", "loss")})
    assert (tmp_path / "report.png").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2


def test_room_is_looked_for_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=500_000_000))
    assert check_room(tmp_path, 100_000_000, kept=3, first=True) == []
    (line,) = check_room(tmp_path, 100_000_000, kept=5, first=False)
    assert "takes 100.00 MB" in line
    assert "not enough for the 5 that are to be kept" in line
    assert check_room(tmp_path, 400_000_000, kept=0, first=False) == []
    with pytest.raises(OSError, match=r"takes 400\.00 MB, .* has 500\.00 MB free, but 800\.00 MB are needed"):
        check_room(tmp_path, 400_000_000, kept=0, first=True)


def test_a_run_without_room_ends_before_it_begins(tmp_path, image_folder, alone, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match=r"a checkpoint takes 1\.\d+ MB, .* has 1\.00 MB free"):
        run(tiny(image_folder, tmp_path / "run"), alone)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


# The disk is filled when the checkpoint of the second epoch is about to be written, and again when the one before the
# last has made room for it.
FILLING = """
import sys, torch
from pathlib import Path
from pcl_fast.train import main
save, full = torch.save, Path(sys.argv.pop(1))
def filling(state, file):
    if state["global_step"] == 8 and not (full.exists() and full.stat().st_size == 0):
        try:
            with full.open("ab", buffering=0) as taking:
                while True:
                    taking.write(bytes(4096))
        except OSError:
            pass
    save(state, file)
torch.save = filling
main()
"""


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_goes_on_when_there_is_room(two_ranks, image_folder, tmp_path, small_disk):
    script, full = tmp_path / "filling.py", small_disk / "full"
    script.write_text(FILLING)
    started = command(image_folder, small_disk / "run", program=(str(script), str(full)), ranks=2)
    done = execute(started)
    assert done.returncode != 0
    assert re.search(r"pcl_fast\.train: cannot write .*: No space left on device; it takes .* are free", done.stderr)
    assert "Error:" not in done.stderr.replace("ChildFailedError:", "")
    assert not list((small_disk / "run").glob("*.tmp"))
    assert load_checkpoint(small_disk / "run")["global_step"] == 4
    full.write_bytes(b"")
    assert execute(started).returncode == 0
    same_state(two_ranks[0], small_disk / "run")
    same_rows(two_ranks[0], small_disk / "run")
