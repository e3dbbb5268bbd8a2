"""Encoders out of this project's own checkpoints."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from foreign import IMAGES
from steps import batch, learner_of, small_config

from pcl_fast.config import to_dict
from pcl_fast.data import normalise
from pcl_fast.errors import CheckpointError
from pcl_fast.nn.encoder import Encoder
from pcl_fast.pretrained import read_pretrained
from pcl_fast.run.checkpoint import load_checkpoint, save_checkpoint
from pcl_fast.run.saving import Progress, Saver


@pytest.fixture
def run(tmp_path, alone):
    """A folder with a checkpoint, and the learner that it is of."""
    config = small_config(output=tmp_path)
    learner = learner_of(config, alone)
    learner.step(batch(), 0)
    record = {"global_step": 3, "metrics_length": 70, "epoch_metrics": {"names": [], "steps": []}}
    Saver(config, "these images", alone).save(learner, Progress(7), record)
    return tmp_path, learner


def unit(found, images):
    with torch.inference_mode():
        return torch.nn.functional.normalize(found.head(found.backbone(images)), dim=1)


@pytest.mark.parametrize("name", ["query", "momentum"])
@pytest.mark.parametrize("given", ["", "checkpoint.pt", "checkpoint-0007.pt", "renamed"])
def test_an_encoder_of_a_run(run, name, given):
    folder, learner = run
    if not (folder / given).exists():
        shutil.copy(folder / "checkpoint.pt", folder / given)
    found = read_pretrained(folder / given, name).to(torch.device("cpu"))
    images = normalise(batch(3).views[0], torch.float32)
    expected = learner.method.encoders()[name].eval()(images)
    assert torch.equal(unit(found, images), expected)
    other = learner.method.encoders()["query" if name == "momentum" else "momentum"].eval()(images)
    assert not torch.equal(expected, other)
    assert (found.encoder, found.arch, found.width) == (name, "cifar_resnet8", 64)
    assert found.path == folder / (given or "checkpoint.pt")
    assert found.source == "a run of pcl_fast with the preset demo"
    assert found.facts == {"epoch": 7}
    assert (found.data.size, found.data.resize, found.data.views) == (20, 20, "digits")
    assert found.notes[0] == "loaded: the backbone, cifar_resnet8, and the projection head, MLP, 64 -> 64 -> 8"
    left = "query" if name == "momentum" else "momentum"
    assert found.notes[1] == f"left out: the {left} encoder, what only training needs"


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({"small_stem": True, "head": "linear"}, "linear, 512 -> 8"),
        ({"bn_splits": 3, "head": "mlp"}, "MLP, 512 -> 512 -> 8"),
        ({"head": "mlp_bn"}, "MLP with batch norm, 512 -> 512 -> 8"),
    ],
)
def test_every_recipe_s_encoder(tmp_path, changes, head):
    config = small_config()
    config = replace(config, model=replace(config.model, arch="resnet18", **changes))
    encoder = Encoder(config.model).eval()
    state = {"config": to_dict(config), "epoch": 2, "encoders": {"query": encoder.state_dict()}}
    save_checkpoint(tmp_path, state)
    found = read_pretrained(tmp_path, "query")
    images = IMAGES[..., ::4, ::4]
    assert torch.equal(unit(found, images), encoder(images).detach())
    assert found.small_stem == config.model.small_stem
    stem = " with the stem for small images" if found.small_stem else ""
    assert found.notes == (
        f"loaded: the backbone, resnet18{stem}, and the projection head, {head}",
        "left out: what only training needs",
    )
    # Fine-tuning takes batches of any length.
    found.backbone.train()(images)


def test_reading_draws_nothing(run):
    folder, _ = run
    state = torch.get_rng_state()
    read_pretrained(folder, "query")
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_there_is_said(run, tmp_path):
    folder, _ = run
    content = load_checkpoint(folder)
    assert read_pretrained(folder, "query", or_only=True).encoder == "query"
    query = content["encoders"].pop("query")
    save_checkpoint(folder, content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt has no query encoder, only momentum"):
        read_pretrained(folder, "query")
    assert read_pretrained(folder, "query", or_only=True).encoder == "momentum"
    del query["head.0.bias"]
    query["head.4.bias"] = torch.zeros(3)
    save_checkpoint(folder, {**content, "encoders": {"query": query}})
    with pytest.raises(CheckpointError, match=r"missing: query: head\.0\.bias \[64\]; left over: query: head\.4"):
        read_pretrained(folder, "query")
    torch.save({**content, "format": 1}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"old\.pt was not written by this version"):
        read_pretrained(tmp_path / "old.pt", "momentum")
