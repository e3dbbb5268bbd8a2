"""The example for Slurm, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm.sh"
# What the script calls. Every stand-in notes its arguments; srun runs until it is told to stop, and a little longer.
COMMANDS = {
    "srun": """
        printf "%s\\n" "$@" >srun.tmp
        mv srun.tmp srun
        until [ -e stop ]; do sleep 0.05; done
        sleep 0.3
        touch ended
        exit "$(cat stop)"
    """,
    "scancel": 'echo "$@" >scancel; echo 1 >stop',
    "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else ls ended && echo "$@" >scontrol; fi',
}


@pytest.fixture
def job(tmp_path):
    """The script at work, in tmp_path; `srun` is under way."""
    for name, text in {**COMMANDS, "activate": ""}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "VENV": str(tmp_path),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "several",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
    }
    line = ["bash", SCRIPT, "/data/images", "/shared/run", "--epochs", "100"]
    job = subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not (tmp_path / "srun").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    yield job
    (tmp_path / "stop").write_text("1")
    job.communicate(timeout=20)


def test_it_starts_one_launcher_per_node(job, tmp_path):
    own, arguments = (tmp_path / "srun").read_text().split("torchrun\n")
    assert own.split() == ["--kill-on-bad-exit=1"]
    launch = get_args_parser().parse_args(arguments.split())
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_backend) == ("2", "8", "c10d")
    assert (launch.rdzv_endpoint, launch.rdzv_id) == ("first:24567", "1234567")
    assert (launch.module, launch.training_script) == (True, "pcl_fast.train")
    expected = "pcl_v2 --data /data/images --output /shared/run --epochs 100"
    assert launch.training_script_args == expected.split()


def test_before_the_time_limit_it_stops_the_step_and_queues_up_again(job, tmp_path):
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 0, job.stderr.read()
    assert (tmp_path / "scancel").read_text().split() == ["--signal=TERM", "1234567.0"]
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", "1234567"]


@pytest.mark.parametrize("code", [0, 3])
def test_what_ends_by_itself_is_not_queued_again(job, tmp_path, code):
    (tmp_path / "stop").write_text(str(code))
    assert job.wait(timeout=20) == code
    assert not (tmp_path / "scontrol").exists()
