"""One run at a time writes into a folder, and no rank outlives its launcher."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.tiny import tiny
from launches import command, on_the_cpu, same_rows, same_state, train

from pcl_fast.errors import UserError
from pcl_fast.files import write_whole
from pcl_fast.run import ownership
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.ownership import OWNER, owned
from pcl_fast.run.rows import RowFile
from pcl_fast.train import run

# Owns a folder for some seconds, and leaves a forked process behind when it is killed, as a loader might.
OWNING = """
import os, sys, time
from pathlib import Path
from pcl_fast.run.ownership import owned
with owned(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(float(sys.argv[2]) if child else 60)
"""


@pytest.fixture
def other(tmp_path):
    """other(seconds) starts a process that owns the folder; all end with the test."""
    started, children = [], []

    def start(seconds: float) -> subprocess.Popen:
        arguments = [sys.executable, "-c", OWNING, str(tmp_path), str(seconds)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        started.append(process)
        children.append(int(process.stdout.readline()))
        return process

    yield start
    for process, child in zip(started, children, strict=True):
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path, image_folder, alone, other, monkeypatch, capsys):
    monkeypatch.setattr(ownership, "_PATIENCE", 0.3)
    process = other(60)
    who = f"process {process.pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=rf"{tmp_path} is in use by {who} \(since 20.*\); stop that run first"):
        run(tiny(image_folder, tmp_path), alone)
    assert f"waiting for {who}" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == [".lock", OWNER]


def test_one_that_is_about_to_end_is_waited_for(tmp_path, other, capsys):
    other(0.5)
    with owned(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert capsys.readouterr().out.count("waiting for") == 1


def test_a_killed_owner_s_forked_processes_do_not_keep_the_folder(tmp_path, other, monkeypatch):
    monkeypatch.setattr(ownership, "_PATIENCE", 0.0)
    process = other(60)
    process.kill()
    process.wait()
    with owned(tmp_path):
        pass
    assert os.listdir(tmp_path) == [".lock"]


def take_over(folder: Path) -> None:
    """As a process on another machine does, where the file system has no locks, or says so and has none."""
    (folder / OWNER).write_text(json.dumps({"host": "node7", "pid": 123, "since": "noon", "token": "theirs"}))


def test_who_has_been_taken_over_writes_nothing_more(tmp_path):
    path, kept = tmp_path / "checkpoint.pt", tmp_path / "checkpoint-0020.pt"
    with owned(tmp_path):
        write_whole(path, lambda file: file.write(b"ours"))
        rows = RowFile(tmp_path / "metrics.jsonl")
        take_over(tmp_path)
        for work in (lambda: write_whole(path, lambda file: file.write(b"new"), also_as=kept), rows.sync):
            with pytest.raises(UserError, match=rf"{tmp_path} has been taken over by process 123 on node7"):
                work()
        rows.close()
    assert path.read_bytes() == b"ours"
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint.pt", "metrics.jsonl", OWNER]
    assert json.loads((tmp_path / OWNER).read_text())["token"] == "theirs"


def test_a_run_that_has_been_taken_over_ends(tmp_path, image_folder, alone, monkeypatch):
    saves = []
    sync = RowFile.sync

    def counted(self):
        saves.append(1)
        if len(saves) == 4:  # two are before the first epoch
            take_over(tmp_path)
        return sync(self)

    monkeypatch.setattr(RowFile, "sync", counted)
    with pytest.raises(UserError, match="taken over by process 123 on node7"):
        run(tiny(image_folder, tmp_path), alone)
    assert load_checkpoint(tmp_path)["epoch"] == 1


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    take_over(tmp_path)
    with owned(tmp_path):
        write_whole(tmp_path / "a", lambda file: file.write(b"1"))
    assert sorted(os.listdir(tmp_path)) == [".lock", "a"]


# A launcher that starts a rank, and the rank: it says its number and, half a second after it has become an orphan,
# whether it was asked to stop.
LAUNCHING = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""
RANK = """
import os, time
from pcl_fast.run import launcher
from pcl_fast.run.signals import StopSignals
parent, launcher._SECONDS_BETWEEN_LOOKS = os.getppid(), 0.05
launcher.end_with_launcher()
with StopSignals() as signals:
    print(os.getpid(), flush=True)
    while os.getppid() == parent:
        time.sleep(0.05)
    time.sleep(0.5)
    print(f"asked to stop: {signals.asked}", flush=True)
"""


@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_stops_when_its_launcher_is_killed(launched):
    """A process that no launcher has started outlives its parent: a shell that is closed, say."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK")}
    environment |= {"LOCAL_RANK": "0"} if launched else {}
    pipe = subprocess.PIPE
    arguments = [sys.executable, "-c", LAUNCHING, RANK]
    launcher = subprocess.Popen(arguments, env=environment, stdout=pipe, stderr=pipe, text=True)
    assert int(launcher.stdout.readline()) != launcher.pid
    launcher.kill()
    said = launcher.communicate()
    assert said[0] == f"asked to stop: {launched}\n"
    assert (f"the launcher, process {launcher.pid}, is gone" in said[1]) == launched


# Steps that are slow enough for the ranks to notice, before the run is at its end, that their launcher is gone.
SLOW_FROM_STEP_5 = """
import time
from pcl_fast.run.metrics import StepMetrics
from pcl_fast.train import main
add = StepMetrics.add
def slowly(self, reached, *args):
    add(self, reached, *args)
    if reached >= 5:
        time.sleep(1)
StepMetrics.add = slowly
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_the_same_command_goes_on_after_the_launcher_was_killed(two_ranks, image_folder, tmp_path):
    """At once: the ranks have noticed, saved and ended, or are waited for."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW_FROM_STEP_5)
    started = command(image_folder, tmp_path / "run", ranks=2, program=(str(script),))
    metrics, said = tmp_path / "run" / "metrics.jsonl", tmp_path / "said"
    with said.open("w") as file:
        launcher = subprocess.Popen(started, env=on_the_cpu(), stdout=file, stderr=file)
        while launcher.poll() is None and not (metrics.exists() and b'"step": 5' in metrics.read_bytes()):
            time.sleep(0.02)
        launcher.kill()
        launcher.wait()
    train(image_folder, tmp_path / "run", ranks=2)
    assert f"the launcher, process {launcher.pid}, is gone" in said.read_text()
    assert "stopped by a signal, all is saved" in said.read_text()
    same_state(two_ranks[0], tmp_path / "run")
    same_rows(two_ranks[0], tmp_path / "run")
