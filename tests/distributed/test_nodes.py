"""Runs on several machines: two launchers that find each other, and what goes wrong only there."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from launches import command, on_the_cpu, same_rows, same_state

from pcl_fast.run.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow


class Machines(NamedTuple):
    """Two machines.

    prefixes: what a command begins with that is to run on the first, or on the second.
    names: their host names.
    endpoint: where the launchers meet.
    """

    prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    names: tuple[str, str]
    endpoint: str

    def run(
        self, data: Path, outputs: tuple[Path, Path], program: tuple[str, ...] = ()
    ) -> tuple[tuple[int, int], tuple[str, str]]:
        """Run training with a launcher and a rank on each machine; return the launchers' exit codes and outputs."""
        meet = ("--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}", "--rdzv-id=1")
        launch = ("--nnodes=2", "--nproc-per-node=1", *meet)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        launchers = []
        try:
            for prefix, output in zip(self.prefixes, outputs, strict=True):
                line = command(data, output, program=program, launch=launch)
                launchers.append(subprocess.Popen([*prefix, *line], env=on_the_cpu(), **options))
            texts = tuple(launcher.communicate(timeout=120)[0] for launcher in launchers)
            return tuple(launcher.returncode for launcher in launchers), texts
        finally:
            for launcher in launchers:
                if launcher.poll() is None:
                    os.killpg(launcher.pid, signal.SIGKILL)
                    launcher.communicate()


@pytest.fixture(scope="module")
def machines(tmp_path_factory) -> Iterator[Machines]:
    """Yield two network namespaces with a cable between them, which know each other by name; or this machine twice, if
    it does not allow namespaces to be made.
    """
    hosts = tmp_path_factory.mktemp("etc") / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n")
    become = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
    spaces = [f"pcl{number}-{os.getpid()}" for number in (1, 2)]
    prefixes = tuple(
        (*f"ip netns exec {space} unshare --uts --mount sh -c".split(), become, f"node{number}", str(hosts))
        for number, space in enumerate(spaces, 1)
    )
    try:
        connect(spaces)
        for prefix in prefixes:
            subprocess.run([*prefix, "true"], check=True, capture_output=True)
        yield Machines(prefixes, ("node1", "node2"), "node1:29400")
    except (OSError, subprocess.CalledProcessError):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        yield Machines(((), ()), (socket.gethostname(),) * 2, f"localhost:{port}")
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


def connect(spaces: list[str]) -> None:
    """Make two network namespaces with a cable between them."""

    def ip(arguments: str) -> None:
        subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)

    for space in spaces:
        ip(f"netns add {space}")
    ip(f"link add cable netns {spaces[0]} type veth peer cable netns {spaces[1]}")
    for number, space in enumerate(spaces, 1):
        ip(f"-n {space} address add 10.77.0.{number}/24 dev cable")
        ip(f"-n {space} link set cable up")
        ip(f"-n {space} link set lo up")


# Only the launcher of rank 0 gets a signal. Saving takes long; at its end rank 1 prints what has been saved by then,
# and ends its own launcher, which would wait five minutes for the other.
STOPPING = """
import os, signal, sys, time
from pathlib import Path
import pcl_fast.run.saving as saving
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import StepMetrics
from pcl_fast.train import main
add, save, rank = StepMetrics.add, saving.save_checkpoint, int(os.environ["RANK"])
def signalling(self, reached, *args):
    add(self, reached, *args)
    if reached == 5 and rank == 0:
        os.kill(os.getppid(), signal.SIGTERM)
    if reached >= 5:
        time.sleep(0.5)
def slow(*args, **kwargs):
    time.sleep(0.5)
    save(*args, **kwargs)
StepMetrics.add, saving.save_checkpoint = signalling, slow
main()
if rank == 1:
    print("rank 1 ends, saved is", load_checkpoint(Path(sys.argv[sys.argv.index("--output") + 1]))["global_step"])
    sys.stdout.flush()
    os.kill(os.getppid(), signal.SIGTERM)
"""


def test_a_signal_to_one_machine_stops_both_and_they_continue_as_one_would(two_ranks, image_folder, machines, tmp_path):
    """They end bit for bit where two processes of one launcher end."""
    (tmp_path / "stopping.py").write_text(STOPPING)
    run = tmp_path / "run"
    _, texts = machines.run(image_folder, (run, run), program=(str(tmp_path / "stopping.py"),))
    assert "stopped by a signal" in "".join(texts), texts
    step = load_checkpoint(run)["global_step"]
    assert 5 <= step < 8
    assert f"rank 1 ends, saved is {step}" in "".join(texts), texts
    codes, texts = machines.run(image_folder, (run, run))
    assert codes == (0, 0), texts
    same_state(two_ranks[0], run)
    same_rows(two_ranks[0], run)


def test_folders_that_are_not_shared_end_the_run_on_both(two_ranks, image_folder, machines, tmp_path):
    """The second machine does not see what the first has saved."""
    outputs = tmp_path / "one", tmp_path / "other"
    shutil.copytree(two_ranks[0], outputs[0])
    codes, texts = machines.run(image_folder, outputs)
    assert 0 not in codes
    for text in texts:
        assert "--output must be a folder that all machines share" in text, text
        assert f"the checkpoint of step 12, the last: {machines.names[0]} (rank 0)" in text
        assert f"no checkpoint: {machines.names[1]} (rank 1)" in text
        assert "pcl_fast/trainer.py" not in text  # no stack trace
    assert not outputs[1].exists()
    same_rows(two_ranks[0], outputs[0])
