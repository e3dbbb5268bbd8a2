"""All tasks by one command, on one rank and on two."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from class_folders import write_images
from launches import execute

TASKS = ("ami", "cluster-sizes", "knn", "linear", "map", "mutual-information", "semi", "svm")


def evaluate_all(run: Path, data: Path, output: Path, ranks: int) -> tuple[int, str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()
    flags = ("--data", str(data), "--output", str(output))
    done = execute([sys.executable, *launcher, "-m", "pcl_fast.evaluate", "all", str(run), *flags])
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_all_tasks_of_a_run_find_the_same_on_two_ranks(two_ranks, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(two_ranks[0], run)
    for part in ("train", "val"):
        write_images(data / part)
    code, text = evaluate_all(run, data, tmp_path / "one", 1)
    assert code == 0, text
    assert "detection is left out: " in text
    code, text = evaluate_all(run, data, tmp_path / "two", 2)
    # One task that cannot be done does not keep the others from it, but the command says so.
    assert code != 0, text
    assert "semi cannot be done: a batch of 3 images is too small for batch norm" in text
    assert "of all tasks these could not be done, see above: semi" in text
    for task in TASKS:
        assert (tmp_path / "one" / f"{task}.json").exists()
        if task == "semi":
            continue
        one, two = (json.loads((tmp_path / ranks / f"{task}.json").read_text()) for ranks in ("one", "two"))
        assert one["scores"]
        if task != "map":  # t-SNE magnifies rounding
            for ours, theirs in zip(one["scores"], two["scores"], strict=True):
                assert theirs == pytest.approx(ours, abs=1e-3), task
        assert not list((tmp_path / "one").glob("*.part.pt"))
