"""The launcher for one machine: what ranks get, what their end means, and that nothing listens for other machines."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from faults.injuries import descendants, wait_for_end
from launches import command, execute, on_the_cpu, same_rows, same_state

from pcl_fast import launch as launcher
from pcl_fast.errors import UserError
from pcl_fast.launch import launch


def python(text: str) -> list[str]:
    return ["-c", "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + text]


def test_ranks_know_each_other(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    text = f"import json\njson.dump(dict(os.environ), open({str(tmp_path)!r} + os.sep + str(rank), 'w'))"
    assert launch(python(text), 3) == 0
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    for rank, environment in enumerate(found):
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
        assert environment["GLOO_SOCKET_IFNAME"].startswith("lo")
        assert environment["NCCL_SOCKET_IFNAME"] == "eth7"  # the user's
        assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_the_first_failure_is_the_launcher_s(capfd):
    assert launch(python("time.sleep(0.3 * (1 - rank)); sys.exit(rank and 3)"), 2) == 3
    assert capfd.readouterr().err == ""


def test_a_rank_that_was_killed_is_named(capfd):
    assert launch(python("rank and os.kill(os.getpid(), signal.SIGKILL)"), 2) == 137
    said = capfd.readouterr().err
    assert said.startswith("pcl_fast.launch: rank 1, process ")
    assert said.endswith(", was ended by SIGKILL, as by a system that is short of memory\n")


def test_a_rank_that_was_ended_by_a_signal_without_a_name(capfd):
    number = signal.SIGRTMIN + 3
    assert launch(python(f"rank and os.kill(os.getpid(), {number})"), 2) == 128 + number
    assert capfd.readouterr().err.endswith(f", was ended by signal {number}\n")


def test_the_others_may_end_by_themselves(tmp_path, monkeypatch):
    """A rank that saves when another is gone."""
    monkeypatch.setattr(launcher, "_SECONDS_TO_NOTICE", 0.1)
    saved = tmp_path / "saved"
    text = f"""
def save(*_):
    time.sleep(0.5)
    open({str(saved)!r}, "w").close()
    sys.exit()
signal.signal(signal.SIGTERM, save)
open({str(tmp_path / "ready")!r}, "w").close() if rank == 0 else None
while rank == 0 or not os.path.exists({str(tmp_path / "ready")!r}):
    time.sleep(0.02)
sys.exit(5)
"""
    assert launch(python(text), 2) == 5
    assert saved.exists()


# Rank 1 fails once rank 0 hangs, and with it a process that it has started, as one that loads images is.
HANGING = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0:
    started = os.fork()
    if started:
        with open({hangs!r} + ".new", "w") as file:
            file.write(str(started))
        os.rename({hangs!r} + ".new", {hangs!r})
    time.sleep(120)
while not os.path.exists({hangs!r}):
    time.sleep(0.02)
sys.exit(7)
"""


def test_one_that_hangs_is_ended_with_all_that_it_started(monkeypatch, tmp_path):
    monkeypatch.setattr(launcher, "_SECONDS_TO_NOTICE", 0.2)
    monkeypatch.setattr(launcher, "_SECONDS_TO_END", 0.3)
    begin = time.monotonic()
    assert launch(python(HANGING.format(hangs=str(tmp_path / "hangs"))), 2) == 7
    assert wait_for_end(int((tmp_path / "hangs").read_text()), patience=20)
    assert time.monotonic() - begin < 60


# A rank that says when it can be signalled, and ends a while after the signal, without a fault.
PATIENT = """
asked = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: asked.append(number))
os.write(1, b"ready\\n")
while not asked:
    time.sleep(0.02)
time.sleep(0.5)
os.write(1, f"{signal.Signals(asked[0]).name}\\n".encode())
"""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """start(text) starts the command, as a user does, with two ranks of a script. All end with the test."""
    started = []

    def start(text: str, *prefix: str) -> subprocess.Popen:
        script = tmp_path / "script.py"
        script.write_text(python(text)[1])
        line = [*prefix, sys.executable, "-m", "pcl_fast.launch", "--nproc-per-node=2", str(script)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(line, env=on_the_cpu(), **pipes))
        return started[-1]

    yield start
    for process in started:
        family = descendants(process.pid)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on_and_the_end_is_waited_for(start, number):
    process = start(PATIENT)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(number)
    said, faults = process.communicate(timeout=60)
    assert (said, faults, process.returncode) == (f"{number.name}\n" * 2, "", 0)


# Rank 1 hangs, rank 0 asks the launcher to end, three times.
ASKING = """
if rank:
    os.kill(os.getpid(), signal.SIGSTOP)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(3):
    time.sleep(0.5)
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_one_that_hangs_can_be_ended_by_the_third_signal(monkeypatch, capfd):
    """Not by the second, which says so."""
    monkeypatch.setattr(launcher, "_SECONDS_OF_PATIENCE", 0.1)
    begin = time.monotonic()
    assert launch(python(ASKING), 2) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 30
    warned, killed = capfd.readouterr().err.splitlines()
    assert warned.startswith("pcl_fast.launch: not ended yet: rank 0, process ")
    assert "; rank 1, process " in warned
    assert warned.endswith("Another SIGTERM kills them, and what was learned since the last checkpoint is lost")
    assert killed == "pcl_fast.launch: the ranks were killed"


def test_signals_that_come_in_a_row_kill_nobody(capfd):
    """A terminal sends one to its whole group, and a script in it may pass its own on."""
    text = """
signal.signal(signal.SIGTERM, lambda *_: None)
time.sleep(1)  # until both are ready
if rank == 0:
    for _ in range(3):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.1)
time.sleep(0.5)
"""
    assert launch(python(text), 2) == 0
    assert capfd.readouterr().err == ""


def test_under_nohup_a_hangup_ends_nothing(start):
    process = start("os.write(1, b'ready\\n')\ntime.sleep(1)\nos.write(1, b'done\\n')", "nohup")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[0] == "done\n" * 2
    assert process.returncode == 0


def test_ranks_notice_a_launcher_that_was_killed_before_they_looked(start):
    """While they imported PyTorch, say."""
    text = """
from pcl_fast.run import launcher
parent, launcher._SECONDS_BETWEEN_LOOKS = os.getppid(), 0.05
os.write(1, b"ready\\n")
while os.getppid() == parent:
    time.sleep(0.02)
launcher.end_with_launcher()
time.sleep(60)
print("missed it", flush=True)
"""
    process = start(text)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.kill()
    said, faults = process.communicate(timeout=60)
    assert said == ""
    assert f"the launcher, process {process.pid}, is gone" in faults


def test_what_a_rank_starts_is_not_a_rank_without_a_launcher(start):
    """It inherits the rank's environment, and its parent is the rank."""
    text = """
import subprocess
own = "import time; from pcl_fast.run import launcher; launcher._SECONDS_BETWEEN_LOOKS = 0.05; "
own += "launcher.end_with_launcher(); time.sleep(0.3); print('done', flush=True)"
sys.exit(subprocess.run([sys.executable, "-c", own]).returncode)
"""
    process = start(text)
    assert process.communicate(timeout=60) == ("done\n" * 2, "")
    assert process.returncode == 0


@pytest.mark.parametrize("lo", ["down", "missing"])
def test_a_machine_without_loopback(monkeypatch, lo):
    if lo == "missing":
        monkeypatch.setattr("socket.if_nameindex", lambda: [(2, "eth0")])
    else:
        monkeypatch.setattr("socket.socket.connect", unreachable)
    with pytest.raises(
        UserError, match=r"the ranks cannot meet at 127\.0\.0\.1.* has no loopback interface that is up"
    ):
        launch(python("pass"), 2)


def unreachable(*_):
    raise OSError(errno.ENETUNREACH, "Network is unreachable")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--nproc-per-node=0", "x.py"], "--nproc-per-node must be 1 or more, not 0"),
        (["-m", "pcl_fast.train"], "the following arguments are required: --nproc-per-node"),
        (["--nproc-per-node=2"], "the following arguments are required: program"),
    ],
)
def test_bad_arguments(arguments, fault, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["launch", *arguments])
    with pytest.raises(SystemExit):
        launcher.main()
    assert fault in capsys.readouterr().err


# Ranks that are connected, each of which prints where it and the launcher listen.
LISTENING = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from listening import listening_addresses
import torch.distributed as dist
from pcl_fast.distributed import connect, disconnect
world = connect()
dist.barrier()
found = [*listening_addresses(os.getppid()), *listening_addresses(os.getpid())]
os.write(1, f"listening {{' '.join(found)}}\\n".encode())
dist.barrier()
disconnect(world)
"""


def addresses(folder: Path, *launching: str) -> set[str]:
    script = folder / "script.py"
    script.write_text(python(LISTENING)[1])
    done = execute([sys.executable, "-m", *launching, "--nproc-per-node=2", str(script)])
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("listening")]
    found = [address.rpartition(":")[0] for line in lines for address in line]
    assert len(found) >= 4  # the store and a rank's own, from both ranks
    return set(found)


def test_nothing_listens_for_other_machines(tmp_path):
    """Not the launcher, not the ranks."""
    assert addresses(tmp_path, "pcl_fast.launch") == {"127.0.0.1"}


@pytest.mark.slow
def test_torchrun_does(tmp_path):
    """What docs/training.md says of it, and that the test above would notice."""
    assert addresses(tmp_path, "torch.distributed.run", "--standalone") & {"0.0.0.0", "::"}


@pytest.mark.slow
def test_a_run_is_the_same_as_with_torchrun(two_ranks, image_folder, tmp_path):
    line = command(image_folder, tmp_path)
    done = execute([sys.executable, "-m", "pcl_fast.launch", "--nproc-per-node=2", *line[1:]])
    assert done.returncode == 0, done.stderr
    same_state(two_ranks[0], tmp_path)
    same_rows(two_ranks[0], tmp_path)
