"""Whole runs through the command line: end to end, interrupted, resumed, refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pcl_fast.checkpoint import load_checkpoint
from pcl_fast.metrics import read_rows

FLAGS = """
    --data.size 16 --data.resize 20 --epochs 3 --optim.batch-size 12 --log-every 1
    --model.queue-size 50 --model.dim 16 --loss.num-negatives 4
    --cluster.ks 3 9 --cluster.warmup-epochs 1 --cluster.iterations 3
    --evaluation.every 1 --evaluation.neighbours 5 --checkpoint.keep-every 2
"""


def command(data: Path, output: Path, *flags: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [
        *(launcher if ranks > 1 else [sys.executable]),
        *("-m", "pcl_fast.train", "demo", "--data", str(data), "--output", str(output)),
        *FLAGS.split(),
        *flags,
    ]


def train(*arguments, ranks: int = 1, code: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(*arguments, ranks=ranks), env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == (code != 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def interrupt_after_steps(steps: int, number: signal.Signals, data: Path, output: Path, ranks: int = 1) -> str:
    """Start the run, send a signal once `steps` are recorded, and wait for it to end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command(data, output, ranks=ranks), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"kind": "step"') >= steps):
        assert run.poll() is None, run.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(number)
    text = run.communicate(timeout=120)[0]
    if ranks == 1:
        assert run.returncode == 0, text
    return text


def same_state(one: Path, other: Path) -> None:
    """Weights, momentum twin, queue, optimiser and prototypes, bit for bit."""
    a, b = load_checkpoint(one), load_checkpoint(other)
    assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])

    def compare(x, y, path):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), path
        elif isinstance(x, dict):
            assert x.keys() == y.keys(), path
            for key in x:
                compare(x[key], y[key], f"{path}.{key}")
        elif isinstance(x, list):
            assert len(x) == len(y), path
            for number, (left, right) in enumerate(zip(x, y, strict=True)):
                compare(left, right, f"{path}[{number}]")
        else:
            assert x == y, path

    for part in ("learner", "prototypes"):
        compare(a[part], b[part], part)


@pytest.fixture(scope="module")
def two_ranks(image_folder, tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run on two ranks, and what it printed."""
    output = tmp_path_factory.mktemp("two_ranks")
    return output, train(image_folder, output, ranks=2)


@pytest.fixture(scope="module")
def one_rank(image_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one_rank")
    train(image_folder, output)
    return output


def test_end_to_end(two_ranks):
    output, text = two_ranks
    present = {path.name for path in output.iterdir()}
    assert {"config.json", "checkpoint.pt", "checkpoint-0002.pt", "metrics.jsonl", "report.png"} <= present
    assert any(name.startswith("events.out.tfevents") for name in present)
    rows = read_rows(output)
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all("prototype_loss" not in row for row in steps[:4])
    assert all(row["loss"] == pytest.approx(row["instance_loss"] + row["prototype_loss"]) for row in steps[4:])
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["epoch"] for row in evaluations] == [0, 1, 2, 3]
    assert [sorted(row["ami"]) for row in evaluations] == [[], ["3", "9"], ["3", "9"], ["3", "9"]]
    assert {row["k"] for row in rows if row["kind"] == "clustering"} == {3, 9}
    assert text.count("epoch 1/3") == 1
    assert json.loads((output / "config.json").read_text())["cluster"]["ks"] == [3, 9]


def test_checkpoint_holds_the_run(two_ranks):
    state = load_checkpoint(two_ranks[0])
    assert (state["epoch"], state["step"]) == (3, 0)
    assert set(state["learner"]) == {"encoder", "momentum_encoder", "queue", "optimizer", "scaler"}
    assert [len(granularity["centroids"]) for granularity in state["prototypes"]] == [3, 9]
    assert len(state["ranks"]) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_continues_bit_for_bit(one_rank, image_folder, tmp_path, number):
    """Stopped in the second epoch (of four steps each), after the first E-step."""
    text = interrupt_after_steps(6, number, image_folder, tmp_path)
    assert "stopped by a signal" in text
    state = load_checkpoint(tmp_path)
    assert 6 <= state["global_step"] < 12
    train(image_folder, tmp_path)
    same_state(one_rank, tmp_path)
    kinds = [(row["kind"], row["step"], row.get("k")) for row in read_rows(tmp_path)]
    assert kinds == [(row["kind"], row["step"], row.get("k")) for row in read_rows(one_rank)]


def test_two_ranks_agree_when_to_stop_and_continue_bit_for_bit(two_ranks, image_folder, tmp_path):
    interrupt_after_steps(5, signal.SIGTERM, image_folder, tmp_path, ranks=2)
    assert 5 <= load_checkpoint(tmp_path)["global_step"] < 12
    train(image_folder, tmp_path, ranks=2)
    same_state(two_ranks[0], tmp_path)


def test_a_killed_run_continues_from_the_last_epoch_bit_for_bit(one_rank, image_folder, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command(image_folder, tmp_path), env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "checkpoint.pt").exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    train(image_folder, tmp_path)
    same_state(one_rank, tmp_path)


def test_a_finished_run_changes_nothing(one_rank, image_folder):
    before = read_rows(one_rank)
    train(image_folder, one_rank)
    after = read_rows(one_rank)
    assert [row["kind"] for row in after] == [row["kind"] for row in before]


def test_without_prototypes_and_labels(image_folder, tmp_path):
    """MoCo on a flat folder: no clustering, nothing to evaluate."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(image_folder.glob("*/*.jpg"))):
        (flat / f"{number}.jpg").symlink_to(path)
    train(flat, tmp_path / "run", "--cluster.ks")
    kinds = {row["kind"] for row in read_rows(tmp_path / "run")}
    assert kinds == {"step", "epoch"}
    assert (tmp_path / "run" / "report.png").exists()


def test_another_recipe_is_refused(one_rank, image_folder):
    text = train(image_folder, one_rank, "--optim.lr", "0.5", "--cluster.ks", "4", code=1)
    assert "cluster.ks: [3, 9] -> [4]" in text
    assert "optim.lr: 0.05 -> 0.5" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cluster.ks", "60"], "cannot make 60 clusters of 53 images; set --cluster.ks"),
        (["--optim.batch-size", "100"], "--optim.batch-size 100 is larger than the data set of 53 images"),
        (["--model.arch", "vgg11"], "--model.arch vgg11"),
        (["--optim.lr", "-1"], "--optim.lr must be positive"),
        (["--optim.lr", "1e30"], "is not finite|is nan|is inf"),
    ],
)
def test_bad_values_end_in_one_line(image_folder, tmp_path, flags, message):
    text = train(image_folder, tmp_path, *flags, code=1)
    assert len(re.findall(message, text)) == 1, text
    assert "Traceback" not in text


def test_missing_data_is_said(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pcl_fast.train", "pcl_v2", "--output", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "--data is missing" in done.stderr
