"""Checkpoints survive whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from pcl_fast.errors import CheckpointError
from pcl_fast.run.checkpoint import load_checkpoint, save_checkpoint

WRITER = """
import sys, torch
from pathlib import Path
from pcl_fast.run.checkpoint import save_checkpoint
for number in range(1, 10**6):
    save_checkpoint(Path(sys.argv[1]), {"number": number, "weights": torch.full((4_000_000,), float(number))})
    print(number, flush=True)
"""


def test_what_was_saved_is_loaded(tmp_path):
    state = {"weights": torch.randn(4), "epoch": 3, "nested": [{"a": torch.ones(1)}, None]}
    save_checkpoint(tmp_path, state)
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded["weights"], state["weights"])
    assert loaded["epoch"] == 3
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_kept_checkpoints_do_not_change(tmp_path):
    save_checkpoint(tmp_path, {"epoch": 1}, keep_as="checkpoint-0001.pt")
    save_checkpoint(tmp_path, {"epoch": 2})
    assert torch.load(tmp_path / "checkpoint-0001.pt", weights_only=True)["epoch"] == 1
    assert load_checkpoint(tmp_path)["epoch"] == 2


def test_a_crash_before_the_rename_cannot_spoil_a_kept_checkpoint(tmp_path, monkeypatch):
    replace = os.replace

    def crash(source, target):
        if target.name == "checkpoint.pt":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, {"epoch": 20}, keep_as="checkpoint-0020.pt")
    save_checkpoint(tmp_path, {"epoch": 21})
    assert torch.load(tmp_path / "checkpoint-0020.pt", weights_only=True)["epoch"] == 20


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None


def test_an_unreadable_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is no readable checkpoint"):
        load_checkpoint(tmp_path)


def test_another_version_s_checkpoint_is_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"old\.pt was not written by this version"):
        load_checkpoint(tmp_path / "old.pt")


def test_kill_during_a_save_leaves_the_last_one_readable(tmp_path):
    """Killed at several moments of a save that takes longer (16 MB to disk) than the pauses between them."""
    for attempt in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        saved = int(writer.stdout.readline())
        time.sleep(0.007 * attempt)
        writer.send_signal(signal.SIGKILL)
        saved = max([saved, *map(int, writer.stdout.read().split())])
        writer.wait()
        state = load_checkpoint(tmp_path)
        assert state["number"] in (saved, saved + 1)
        assert (state["weights"] == state["number"]).all()
