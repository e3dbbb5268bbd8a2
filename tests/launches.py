"""Whole tiny runs through the command line, and how two of them compare."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import pcl_fast.evaluate as command_of_evaluation
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import read_rows

FLAGS = shlex.split("""
    --data.size 16 --data.resize 20 --epochs 3 --optim.batch-size 12 --log-every 1
    --model.queue-size 50 --model.dim 16 --loss.num-negatives 4
    --cluster.ks 3 9 --cluster.warmup-epochs 1 --cluster.iterations 3
    --evaluation.every 1 --evaluation.neighbours 5 --checkpoint.keep-every 2
""")


# Sends a signal when a step is done: to its whole process group, as a terminal does, or to its launcher,
# and then slows down so that what the launcher does comes before the end.
SIGNALLING = """
import os, sys, time
from pcl_fast.run.metrics import StepMetrics
from pcl_fast.train import main
add, step, number, to_launcher = StepMetrics.add, int(sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
def signalling(self, reached, *args):
    add(self, reached, *args)
    if reached == step and os.environ.get("RANK", "0") == "0":
        os.kill(os.getppid(), number) if to_launcher else os.killpg(0, number)
    if reached >= step and to_launcher:
        time.sleep(1)
StepMetrics.add = signalling
if __name__ == "__main__":
    main()
"""


def command(
    data: Path,
    output: Path,
    *flags: str,
    ranks: int = 1,
    program: tuple[str, ...] = (),
    launch: tuple[str, ...] = (),
    preset: str = "demo",
    tiny: Sequence[str] = FLAGS,
) -> list[str]:
    """launch: flags of torchrun, if not for `ranks` processes on this machine; tiny: those that make the preset so."""
    if ranks > 1:
        launch = ("--standalone", f"--nproc-per-node={ranks}")
    launcher = ("-m", "torch.distributed.run", *launch) if launch else ()
    program = program or ("-m", "pcl_fast.train")
    return [
        *(sys.executable, *launcher, *program, preset, "--data", str(data), "--output", str(output)),
        *(*tiny, *flags),
    ]


def on_the_cpu() -> dict[str, str]:
    """The environment, for one thread per rank: bit-equality is tested, and ranks would have to share a GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def execute(command: list[str]) -> subprocess.CompletedProcess:
    # In a process group of its own, which can be signalled without ending the tests.
    return subprocess.run(
        command, env=on_the_cpu(), capture_output=True, text=True, timeout=300, start_new_session=True
    )


def train(*arguments, code: int = 0, **options) -> str:
    done = execute(command(*arguments, **options))
    assert (done.returncode != 0) == (code != 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def interrupt(
    step: int, number: signal.Signals, folder: Path, data: Path, output: Path, *flags: str, ranks: int = 1, **options
):
    """Run until a signal comes after `step` steps; returns the ended process."""
    script = folder / "signalling.py"
    script.write_text(SIGNALLING)
    program = (str(script), str(step), str(int(number)), str(int(ranks > 1)))
    return execute(command(data, output, *flags, ranks=ranks, program=program, **options))


def same_state(one: Path, other: Path) -> None:
    """Everything that is learned, bit for bit."""
    a, b = load_checkpoint(one), load_checkpoint(other)
    assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])

    for part in ("method", "encoders", "optimizer", "scaler"):
        same(a[part], b[part], part)


def same(x, y, path: str) -> None:
    """Nested values with tensors, bit for bit."""
    if isinstance(x, torch.Tensor):
        assert torch.equal(x, y), path
    elif isinstance(x, dict):
        assert x.keys() == y.keys(), path
        for key in x:
            same(x[key], y[key], f"{path}.{key}")
    elif isinstance(x, list):
        assert len(x) == len(y), path
        for number, (left, right) in enumerate(zip(x, y, strict=True)):
            same(left, right, f"{path}[{number}]")
    else:
        assert x == y, path


def same_rows(one: Path, other: Path) -> None:
    """But for times, and for what every start finds out. An epoch's means are over all its steps, whenever they were
    done.
    """
    rows = [
        [
            (row["kind"], row["step"], row.get("k"), row.get("loss"))
            for row in read_rows(folder)
            if row["kind"] != "feature_pass"
        ]
        for folder in (one, other)
    ]
    assert rows[0] == rows[1]


def run_here(main: Callable[[], None], *arguments: object) -> str | None:
    """Run a command in this process; the message with which it ends, if it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["command", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as error:
            return str(error.code)
    return None


evaluate = functools.partial(run_here, command_of_evaluation.main)
