"""A run may be made longer where the schedule permits it; else the way out is named."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from faults.tiny import tiny
from launches import same_state

from pcl_fast import trainer
from pcl_fast.config import PRESETS, to_dict
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.continuing import check_same_run, check_taken_up
from pcl_fast.run.rows import read_rows
from pcl_fast.train import run


def test_with_steps_it_ends_as_if_it_had_been_begun_so(tmp_path, image_folder, alone, capsys):
    """Though the former end had an E-step, which must not come twice where k-means starts from the last one's."""
    names = ("ks", "warmup_epochs", "init", "redo", "iterations", "warm_iterations")
    changes = {f"cluster__{name}": value for name, value in zip(names, ((3,), 1, "previous", 1, 1, 1), strict=True)}
    run(tiny(image_folder, tmp_path / "whole", **changes, epochs=3), alone)
    run(tiny(image_folder, tmp_path / "run", **changes, epochs=2), alone)
    capsys.readouterr()
    run(tiny(image_folder, tmp_path / "run", **changes, epochs=3), alone)
    assert "epochs: 2 -> 3" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run")["finished"]
    same_state(tmp_path / "whole", tmp_path / "run")
    steps = [row["step"] for row in read_rows(tmp_path / "run") if row["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_also_where_it_had_no_pass_over_the_images(tmp_path, image_folder, alone, monkeypatch):
    """So that nothing was decided about one. A last batch of one image shows the bits of other operations."""
    monkeypatch.setattr(trainer, "CLUSTERING_BATCH", 13)
    monkeypatch.setattr(trainer, "encoded_at_a_time", lambda device: 13)
    changes = {"cluster__ks": (3,), "cluster__warmup_epochs": 2}
    run(tiny(image_folder, tmp_path / "whole", **changes, epochs=3), alone)
    run(tiny(image_folder, tmp_path / "run", **changes, epochs=1), alone)
    run(tiny(image_folder, tmp_path / "run", **changes, epochs=3), alone)
    same_state(tmp_path / "whole", tmp_path / "run")


def state_of(epoch: int, step: int = 0, **optim) -> tuple[dict, object]:
    """A checkpoint's description, and the recipe under which it was made."""
    config = PRESETS["demo"][1]
    config = replace(config, epochs=10, optim=replace(config.optim, **optim))
    return {"config": to_dict(config), "data": "images", "epoch": epoch, "step": step}, config


@pytest.mark.parametrize(("epoch", "step", "epochs"), [(10, 0, 12), (10, 0, 10), (5, 0, 12), (5, 3, 6), (5, 0, 5)])
def test_with_steps_any_length_will_do_that_is_not_past(epoch, step, epochs):
    state, config = state_of(epoch, step, schedule="step", milestones=(3, 8), warmup_epochs=2)
    lines = check_same_run(state, replace(config, epochs=epochs), "images")
    assert lines == ([] if epochs == 10 else [f"epochs: 10 -> {epochs}"])


@pytest.mark.parametrize(("epoch", "step", "epochs", "least"), [(10, 0, 9, 10), (5, 3, 5, 6)])
def test_what_is_past_is_past(epoch, step, epochs, least):
    state, config = state_of(epoch, step, schedule="step")
    with pytest.raises(ValueError, match=f"has come too far for --epochs {epochs}: it must be {least} or more"):
        check_same_run(state, replace(config, epochs=epochs), "images")


def test_with_a_cosine_it_is_refused_with_the_way_out():
    state, config = state_of(10, schedule="cosine", lr=0.1)
    with pytest.raises(
        ValueError, match=r"in epoch 2 .* had a learning rate of 0\.0975528, and would have had 0\.0982963"
    ) as said:
        check_same_run(state, replace(config, epochs=12), "images")
    way = re.search(r"--resume-from (\S+) --output NEW --epochs 12", str(said.value))
    lines = check_taken_up(state, replace(config, epochs=12, resume_from=way[1]), "images")
    assert lines[1:] == ["epochs: 10 -> 12", "learning rate of epoch 11: 0 -> 0.00669873"]


def test_before_the_cosine_differs_it_may_change():
    """The first epoch has the full rate, however many there will be."""
    state, config = state_of(0, 3, schedule="cosine")
    assert check_same_run(state, replace(config, epochs=12), "images") == ["epochs: 10 -> 12"]


def test_other_changes_are_not_let_in_along_with_it():
    state, config = state_of(5, schedule="step")
    with pytest.raises(ValueError, match=r"another recipe(.|\n)*epochs: 10 -> 12\n  seed: 0 -> 1"):
        check_same_run(state, replace(config, epochs=12, seed=1), "images")
