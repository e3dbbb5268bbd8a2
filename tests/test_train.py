"""Whole runs through the command line: end to end, interrupted, resumed, refused."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import pytest
from launches import command, execute, interrupt, same_rows, same_state, train

from pcl_fast.config import PRESETS
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import read_rows
from pcl_fast.schedule import check_sizes


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
    rates = [row["images_per_s"] for row in rows if row["kind"] == "features"]
    assert len(rates) == 4
    assert min(rates) > 0
    assert text.count("epoch 1/3") == 1
    found = re.findall(r"^first step after ([\d.]+) s, ([\d.]+) s of which", text, re.MULTILINE)
    assert len(found) == 1  # of three epochs, and of two ranks
    assert 0 <= float(found[0][1]) < float(found[0][0])
    assert json.loads((output / "config.json").read_text())["cluster"]["ks"] == [3, 9]


def test_checkpoint_holds_the_run(two_ranks):
    state = load_checkpoint(two_ranks[0])
    assert (state["epoch"], state["step"]) == (3, 0)
    assert set(state["encoders"]) == {"query", "momentum"}
    assert {name.split(".")[0] for name in state["method"]} == {"encoder", "momentum_encoder", "queue", "prototypes"}
    assert [len(state["method"][f"prototypes.granularities.{m}.centroids"]) for m in (0, 1)] == [3, 9]
    assert state["method"]["prototypes._extra_state"] is True
    assert len(state["ranks"]) == 2


@pytest.mark.parametrize(
    ("number", "step", "workers"),
    [
        (signal.SIGTERM, 6, "1"),
        pytest.param(signal.SIGINT, 6, "1", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 8, "0", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(one_rank, image_folder, tmp_path, number, step, workers):
    """Epochs have four steps: stopped within the second after the first E-step, and at its very end.

    The signal goes to the loader's processes as well.
    """
    done = interrupt(step, number, tmp_path, image_folder, tmp_path / "run", "--data.workers", workers)
    assert done.returncode == 0, done.stderr
    assert "stopped by a signal" in done.stdout
    # A signal after step 6 is told in the reduction that ends after step 7; an epoch's last ends at once.
    assert load_checkpoint(tmp_path / "run")["global_step"] == (7 if step == 6 else 8)
    train(image_folder, tmp_path / "run")
    same_state(one_rank, tmp_path / "run")
    same_rows(one_rank, tmp_path / "run")


# The same in the midst of the second E-step, which is not waited for.
SIGNALLING_IN_E_STEP = """
import os, signal
import pcl_fast.methods.pcl as pcl
from pcl_fast.train import main
cluster, calls = pcl.cluster, []
def signalling(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        os.killpg(0, signal.SIGTERM)
    return cluster(*args, **kwargs)
pcl.cluster = signalling
main()
"""


# The same while an image is read for the second feature pass, in the training process itself.
SIGNALLING_WHILE_READING = """
import os, signal
from pcl_fast.data.sources.folder import ImageFolder
from pcl_fast.train import main
from pcl_fast.trainer import Trainer
load, before_epoch = ImageFolder.load, Trainer._before_epoch
def signalling(self, index):
    if index == 20 and Trainer.now == 2:
        os.killpg(0, signal.SIGTERM)
    return load(self, index)
def counted(self):
    Trainer.now = self.progress.epoch
    before_epoch(self)
    Trainer.now = -1
ImageFolder.load, Trainer._before_epoch, Trainer.now = signalling, counted, -1
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_signal_while_images_are_read_is_not_their_fault(image_folder, tmp_path, loader):
    script = tmp_path / "signalling.py"
    script.write_text(SIGNALLING_WHILE_READING)
    done = execute(command(image_folder, tmp_path / "run", "--data.loader", loader, program=(str(script),)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped by a signal" in done.stdout
    assert load_checkpoint(tmp_path / "run")["global_step"] == 8


def test_a_signal_ends_an_e_step_and_the_epoch_before_stands(one_rank, image_folder, tmp_path):
    script = tmp_path / "signalling.py"
    script.write_text(SIGNALLING_IN_E_STEP)
    done = execute(command(image_folder, tmp_path / "run", program=(str(script),)))
    assert done.returncode == 0, done.stderr
    assert "stopped by a signal" in done.stdout
    assert load_checkpoint(tmp_path / "run")["global_step"] == 8
    train(image_folder, tmp_path / "run")
    same_state(one_rank, tmp_path / "run")
    same_rows(one_rank, tmp_path / "run")


def test_two_ranks_agree_when_to_stop_and_continue_bit_for_bit(two_ranks, image_folder, tmp_path):
    """The launcher is signalled and signals its whole process group, loader workers included."""
    done = interrupt(5, signal.SIGTERM, tmp_path, image_folder, tmp_path / "run", "--data.workers", "1", ranks=2)
    assert "stopped by a signal" in done.stdout, done.stdout + done.stderr
    assert 5 <= load_checkpoint(tmp_path / "run")["global_step"] < 12
    train(image_folder, tmp_path / "run", ranks=2)
    same_state(two_ranks[0], tmp_path / "run")


def test_a_killed_run_continues_from_the_last_epoch_bit_for_bit(one_rank, image_folder, tmp_path):
    done = interrupt(6, signal.SIGKILL, tmp_path, image_folder, tmp_path / "run")
    assert done.returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "run")["global_step"] == 4
    train(image_folder, tmp_path / "run")
    same_state(one_rank, tmp_path / "run")
    same_rows(one_rank, tmp_path / "run")


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_continues_from_there_bit_for_bit(one_rank, image_folder, tmp_path):
    """Saved as often as a reduction of the metrics ends, which is a step after it began; killed in the second epoch,
    which has four steps.
    """
    flags = ("--checkpoint.every-minutes", "1e-9")
    interrupt(7, signal.SIGKILL, tmp_path, image_folder, tmp_path / "run", *flags)
    state = load_checkpoint(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (1, 2)
    train(image_folder, tmp_path / "run")
    same_state(one_rank, tmp_path / "run")
    same_rows(one_rank, tmp_path / "run")


@pytest.mark.slow
def test_tar_shards_train_as_the_same_files_do(one_rank, image_folder, tmp_path):
    paths = sorted(image_folder.glob("*/*.jpg"))
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, part in enumerate((paths[:20], paths[20:])):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for path in part:
                name = f"{path.parent.name}_{path.stem}"
                tar.add(path, f"{name}.jpg")
                label = tarfile.TarInfo(f"{name}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(path.parent.name[-1].encode()))
    train(shards, tmp_path / "run", "--data.format", "webdataset")
    same_state(one_rank, tmp_path / "run")
    evaluations = [
        [row for row in read_rows(run) if row["kind"] == "evaluation"] for run in (one_rank, tmp_path / "run")
    ]
    assert evaluations[0] == evaluations[1]


@pytest.mark.slow
def test_a_broken_image_ends_the_run_or_is_left_out(image_folder, tmp_path):
    """Broken behind its header, so that nothing is noticed before it is decoded."""
    shutil.copytree(image_folder, tmp_path / "data")
    broken = tmp_path / "data" / "class_1" / "03.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    text = train(tmp_path / "data", tmp_path / "ended", "--cluster.ks", code=1)
    assert f"cannot read image {broken}" in text
    assert "or leave them out of training with --data.skip-broken" in text
    assert "Traceback" not in text
    for time in ("first", "again"):
        text = train(tmp_path / "data", tmp_path / "run", "--cluster.ks", "--data.skip-broken", ranks=2)
        assert "1 images cannot be decoded and are left out" in text, time
    assert "complete" in text
    assert "class_1/03.jpg" in (tmp_path / "run" / "broken.json").read_text()


@pytest.mark.slow
def test_a_run_may_go_on_with_the_other_loader(one_rank, image_folder, tmp_path):
    """What is learned is not the same bit for bit, but it is the same recipe."""
    run = tmp_path / "run"
    flags = ("--data.loader", "torchvision", "--data.workers", "1")
    done = interrupt(5, signal.SIGTERM, tmp_path, image_folder, run, *flags)
    assert "images: torchvision, 1 processes" in done.stdout
    assert "images: dali" in train(image_folder, run)
    losses = [[row["loss"] for row in read_rows(folder) if row["kind"] == "step"] for folder in (one_rank, run)]
    assert len(losses[0]) == len(losses[1]) == 12
    assert losses[0] != losses[1]
    assert losses[0][:4] == pytest.approx(losses[1][:4], abs=0.05)  # later the two cluster differently


def test_a_finished_run_changes_nothing(one_rank, image_folder):
    before = read_rows(one_rank)
    train(image_folder, one_rank)
    after = read_rows(one_rank)
    assert [row["kind"] for row in after] == [row["kind"] for row in before]


@pytest.mark.slow
def test_without_prototypes_and_labels(image_folder, tmp_path):
    """MoCo on a flat folder: no clustering, nothing to evaluate."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(image_folder.glob("*/*.jpg"))):
        (flat / f"{number}.jpg").symlink_to(path)
    train(flat, tmp_path / "run", "--cluster.ks")
    kinds = {row["kind"] for row in read_rows(tmp_path / "run")}
    assert kinds == {"step", "epoch", "finished"}
    assert (tmp_path / "run" / "report.png").exists()


def test_another_recipe_is_refused(one_rank, image_folder):
    text = train(image_folder, one_rank, "--optim.lr", "0.5", "--cluster.ks", "4", code=1)
    assert "cluster.ks: [3, 9] -> [4]" in text
    assert f"optim.lr: {PRESETS['demo'][1].optim.lr} -> 0.5" in text
    assert "Traceback" not in text


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cluster.ks", "60"], "cannot make 60 clusters of 53 images; set --cluster.ks"),
        slow(["--optim.batch-size", "100"], "--optim.batch-size 100 is larger than the data set of 53 images"),
        slow(["--model.arch", "vgg11"], "--model.arch vgg11"),
        slow(["--optim.lr", "-1"], "--optim.lr must be positive"),
        (["--optim.lr", "1e30"], r"loss of step \d+ is (nan|inf); .* images are \[.*class_\d/\d\d\.jpg"),
    ],
)
def test_bad_values_end_in_one_line(image_folder, tmp_path, flags, message):
    text = train(image_folder, tmp_path, *flags, code=1)
    assert len(re.findall(message, text)) == 1, text
    assert "Traceback" not in text


def test_another_data_set_is_refused(one_rank, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "less")
    next((tmp_path / "less" / "class_0").iterdir()).unlink()
    text = train(tmp_path / "less", one_rank, code=1)
    assert "data set: 53 images" in text
    assert "-> 52 images" in text


def test_a_spoiled_checkpoint_is_named(image_folder, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"spoiled")
    text = train(image_folder, tmp_path, code=1)
    assert "checkpoint.pt is no readable checkpoint" in text
    assert "Traceback" not in text


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"--optim.batch-size 64 does not divide among 3 ranks"):
        check_sizes(PRESETS["demo"][1], 5000, 3)


def test_missing_data_is_said(tmp_path):
    done = execute([sys.executable, "-m", "pcl_fast.train", "pcl_v2", "--output", str(tmp_path)])
    assert done.returncode != 0
    assert "--data is missing" in done.stderr
