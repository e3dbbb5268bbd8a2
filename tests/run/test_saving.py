"""Taking up a run, or refusing to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from steps import batch, learner_of, same, small_config, weights

from pcl_fast.config import model_config, to_dict
from pcl_fast.run.checkpoint import load_checkpoint, save_checkpoint
from pcl_fast.run.saving import Progress, Saver

RECORD = {
    "global_step": 3,
    "metrics_length": 70,
    "epoch_metrics": {"names": [], "steps": []},
    "choices": {"kernels_off": ["segment"], "fusion": "triton", "unfused_layers": ["backbone.conv1"]},
}


@pytest.fixture
def config(tmp_path):
    return small_config(output=tmp_path)


def saved(config, alone):
    """A learner after a step, and its checkpoint."""
    learner = learner_of(config, alone)
    learner.step(batch(), 0)
    Saver(config, "these images", alone).save(learner, Progress(0, 3), RECORD)
    return learner


def test_what_was_saved_is_taken_up(config, alone):
    learner, other = saved(config, alone), learner_of(config, alone)
    progress, record = Saver(config, "these images", alone).restore(other)
    assert (progress, record) == (Progress(0, 3), RECORD)
    assert same(weights(learner), weights(other))
    assert same(list(learner.method.buffers()), list(other.method.buffers()))
    learner.step(batch(1), 1)
    other.step(batch(1), 1)
    assert same(weights(learner), weights(other))


def test_a_new_run_begins_at_the_beginning(config, alone):
    assert Saver(config, "these images", alone).restore(learner_of(config, alone)) == (Progress(), {})


@pytest.mark.parametrize(
    ("changes", "images", "message"),
    [
        ({"method": "another"}, "these images", "holds a run of the method pcl, not of another.* preset, demo"),
        ({"seed": 7}, "these images", "under another recipe.*\n  seed: 0 -> 7"),
        ({}, "those images", "data set: these images -> those images"),
    ],
)
def test_another_run_is_refused(config, alone, changes, images, message):
    saved(config, alone)
    with pytest.raises(ValueError, match=message):
        Saver(replace(config, **changes), images, alone).restore(learner_of(config, alone))


def test_what_a_killed_save_left_is_removed(config, alone):
    left = [config.output / f"checkpoint.pt.{number}.tmp" for number in (1, 2)]
    for path in left:
        path.write_bytes(b"half")
    Saver(config, "these images", alone).restore(learner_of(config, alone))
    assert not any(path.exists() for path in left)


def test_an_epoch_s_checkpoint_is_kept_when_asked_for(config, alone):
    learner, saver = learner_of(config, alone), Saver(config, "these images", alone)
    assert [saver.is_kept(epoch) for epoch in (19, 20, 40)] == [False, True, True]
    saver.save(learner, Progress(20), RECORD, keep=True)
    saver.save(learner, Progress(21), RECORD)
    assert load_checkpoint(config.output / "checkpoint-0020.pt")["epoch"] == 20
    assert load_checkpoint(config.output)["epoch"] == 21


@pytest.mark.parametrize(("minutes", "due"), [(0.0, False), (1e-9, True), (30.0, False)])
def test_when_a_save_is_due(config, alone, minutes, due):
    config = replace(config, checkpoint=replace(config.checkpoint, every_minutes=minutes))
    assert Saver(config, "these images", alone).is_due() == due
    assert not Saver(config, "these images", replace(alone, rank=1, size=2)).is_due()


def test_after_a_save_the_next_is_not_due(config, alone):
    config = replace(config, checkpoint=replace(config.checkpoint, every_minutes=1.0))
    saver = Saver(config, "these images", alone)
    saver._saved -= 90
    assert saver.is_due()
    saver.save(learner_of(config, alone), Progress(0, 3), RECORD)
    assert not saver.is_due()


def test_encoders_cost_a_checkpoint_nothing(config, alone):
    """They stand in it twice, but their bytes once."""
    learner = saved(config, alone)
    size = (config.output / "checkpoint.pt").stat().st_size
    torch.save({**load_checkpoint(config.output), "encoders": {}}, config.output / "without.pt")
    weights_size = sum(4 * p.numel() for p in learner.method.encoder.parameters())
    assert size - (config.output / "without.pt").stat().st_size < 0.3 * weights_size


def test_an_encoder_s_configuration_survives_new_fields(config):
    saved_config = json.loads(json.dumps(to_dict(config)))
    del saved_config["model"]["bn_splits"]
    saved_config["model"]["gone"] = 3
    assert model_config(saved_config) == config.model


def test_a_checkpoint_s_format_is_its_own(tmp_path: Path):
    save_checkpoint(tmp_path, {"epoch": 1})
    assert load_checkpoint(tmp_path)["format"] == 2
