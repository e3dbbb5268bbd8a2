"""Whatever has become of metrics.jsonl, the run goes on, says what is missing, and its report is drawn."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from faults.tiny import tiny

from pcl_fast.methods import Metric
from pcl_fast.run.checkpoint import load_checkpoint, save_checkpoint
from pcl_fast.run.metrics import Recorder
from pcl_fast.run.report import write_report
from pcl_fast.run.rows import read_rows
from pcl_fast.train import run

FIRST = [{"kind": "epoch", "step": step, "epoch": step, "loss": 0.5, "lr": 0.1, "seconds": {}} for step in (1, 2, 3)]
LINES = [json.dumps(row).encode() + b"\n" for row in FIRST]
WHOLE = b"".join(LINES)


def resumed(folder: Path, *losses: float) -> list[dict]:
    """The rows after a run was taken up from a checkpoint at step 3, and has written some more."""
    recorder = Recorder(folder, {}, resume_at=(3, 3, len(WHOLE)))
    for loss in losses:
        recorder.row("epoch", 4, 4, loss=loss, lr=0.1, seconds={})
    recorder.sync()
    recorder.close()
    return read_rows(folder)


@pytest.mark.parametrize(
    ("content", "kept", "missing"),
    [
        (None, [], f"metrics.jsonl was gone, with {len(WHOLE)} bytes"),
        (b"", [], f"metrics.jsonl had 0 of {len(WHOLE)} bytes"),
        (b"".join(LINES[:2]), [0, 1], f"had {2 * len(LINES[0])} of"),
        (WHOLE[:-30], [0, 1], "bytes and 1 of its lines were unreadable"),
        (WHOLE[:-1], [0, 1, 2], f"had {len(WHOLE) - 1} of {len(WHOLE)} bytes"),
        (LINES[0] + bytes(len(LINES[1]) - 1) + b"\n" + LINES[2], [0, 2], "1 of its lines were unreadable"),
        (LINES[0] + b'\xff"spoiled"\n' + LINES[1] + LINES[2], [0, 1], "2 of its lines were unreadable"),
        (b"[1, 2]\n" + b"".join(LINES[:2]) + bytes(100), [0, 1], "2 of its lines were unreadable"),
    ],
)
def test_what_is_missing_is_a_row(tmp_path, capsys, content, kept, missing):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    rows = resumed(tmp_path, 0.25)
    assert rows[:-2] == [FIRST[number] for number in kept]
    gap, last = rows[-2:]
    assert (gap["kind"], gap["step"], gap["epoch"], last["loss"]) == ("gap", 3, 3, 0.25)
    assert missing in gap["missing"]
    assert gap["missing"] in capsys.readouterr().out.replace("\n", " ")
    assert all(json.loads(line) for line in path.read_bytes().splitlines())  # for other readers, who are strict
    spoiled = tmp_path / "metrics.jsonl.spoiled"
    assert spoiled.exists() == ("unreadable" in missing)
    assert not spoiled.exists() or spoiled.read_bytes() == content
    write_report(tmp_path, {"loss": Metric("sum", "loss")})


@pytest.mark.parametrize("later", [b"", LINES[0], b'{"half'])
def test_nothing_is_missing_of_a_whole_record(tmp_path, later):
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE + later)
    assert [row["kind"] for row in resumed(tmp_path, 0.25)] == ["epoch"] * 4
    assert not (tmp_path / "metrics.jsonl.spoiled").exists()


def test_a_gap_is_told_once_and_what_comes_after_it_is_written_anew(tmp_path):
    """Taken up from the same checkpoint again and again, which remembers more bytes than there are now."""
    (tmp_path / "metrics.jsonl").write_bytes(LINES[0] + b"spoiled\n")
    first = resumed(tmp_path, 0.25)
    for _ in range(3):
        assert resumed(tmp_path, 0.25, 0.125)[:-1] == first


def test_a_line_that_is_half_written_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE + b'{"kind": "st')
    assert read_rows(tmp_path) == FIRST


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_on_them(tmp_path, image_folder, alone, monkeypatch):
    """The file is flushed after its last row, and only then the checkpoint is renamed."""
    happened, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor):
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("metrics.jsonl"):
            happened.append(os.fstat(descriptor).st_size)

    def renamed(source, target):
        replace(source, target)
        if target.name == "checkpoint.pt":
            happened.append("checkpoint")
            assert load_checkpoint(tmp_path)["metrics_length"] == happened[-2] == os.stat(record).st_size

    record = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    run(tiny(image_folder, tmp_path), alone)
    assert happened.count("checkpoint") == 5  # two at the beginning, two epochs, and the end


def test_a_run_goes_on_without_its_record(tmp_path, image_folder, alone):
    """Also one that is complete, whose report is drawn again."""
    run(tiny(image_folder, tmp_path), alone)
    state = load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, {**state, "epoch": 1, "global_step": 2, "finished": False})
    (tmp_path / "metrics.jsonl").unlink()
    assert run(tiny(image_folder, tmp_path), alone)
    assert [row["kind"] for row in read_rows(tmp_path)] == ["gap", "step", "step", "epoch", "finished"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\0" * 300)
    (tmp_path / "report.png").unlink()
    assert run(tiny(image_folder, tmp_path), alone)
    assert [row["kind"] for row in read_rows(tmp_path)] == ["gap"]
    assert (tmp_path / "report.png").exists()
