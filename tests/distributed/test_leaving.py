"""A rank that ends leaves no thread of its process group behind, which Python's end could make a failure."""

from __future__ import annotations

import shlex
import sys

import pytest
from launches import FLAGS, command, execute

# Runs a command's main, then writes a line for every thread that is left.
PROGRAM = """
import importlib, os, sys
from pathlib import Path

name = sys.argv.pop(1)
sys.argv[0] = name
importlib.import_module(name).main()
names = [Path("/proc/self/task", thread, "comm").read_text() for thread in os.listdir("/proc/self/task")]
os.write(2, "".join(f"left: {name}" for name in names).encode())
"""
# Its batch norm computes with the group as well.
SIAMESE = shlex.split("""
    --data.size 16 --data.resize 20 --optim.batch-size 12 --optim.warmup-epochs 0 --model.arch cifar_resnet8
    --model.dim 16 --cluster.ks 3 --siamese.components 8
""")

# Has a thread of the group wait for Python's lock, to give back tensors, when the rank leaves.
GIVING_BACK = """
import sys, time
import torch, torch.distributed as dist
from pcl_fast.distributed import connect, disconnect

world = connect()
sys.setswitchinterval(1000)
dist.all_gather([torch.zeros(5) for _ in range(2)], torch.ones(5), async_op=True)
until = time.perf_counter() + 0.5
while time.perf_counter() < until:
    pass
disconnect(world)
"""


@pytest.fixture
def program(tmp_path) -> str:
    (tmp_path / "script.py").write_text(PROGRAM)
    return str(tmp_path / "script.py")


def check(arguments: list[str]) -> None:
    done = execute(arguments)
    assert done.returncode == 0, done.stderr
    left = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("left: ")]
    assert len(left) >= 2
    assert "pt_gloo_runloop" not in left


@pytest.mark.parametrize(("preset", "tiny"), [("demo", FLAGS), ("siamese_pcl", SIAMESE)])
def test_after_training_the_group_s_threads_have_ended(image_folder, tmp_path, program, preset, tiny):
    options = {"ranks": 2, "program": (program, "pcl_fast.train"), "preset": preset, "tiny": tiny}
    check(command(image_folder, tmp_path / "run", "--epochs", "1", **options))


def test_after_an_evaluation_the_group_s_threads_have_ended(two_ranks, image_folder, tmp_path, program):
    for part in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / part).symlink_to(image_folder)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    flags = ("--data", str(tmp_path / "data"), "--output", str(tmp_path / "scores"), "--batch-size", "12")
    check([sys.executable, *launcher, program, "pcl_fast.evaluate", "linear", str(two_ranks[0]), *flags])


def test_a_thread_that_gives_back_tensors_is_waited_for_and_does_not_wait(tmp_path):
    """It would in PyTorch 2.5, the only one with which this can fail (make check-v100)."""
    (tmp_path / "script.py").write_text(GIVING_BACK)
    done = execute([sys.executable, "-m", "pcl_fast.launch", "--nproc-per-node=2", str(tmp_path / "script.py")])
    assert (done.returncode, done.stderr) == (0, "")
