"""A checkpoint that is none, or not ours, is told by what it holds."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from steps import learner_of, small_config

from pcl_fast.errors import CheckpointError
from pcl_fast.run.checkpoint import FORMAT, PARTS, load_checkpoint, save_checkpoint
from pcl_fast.run.saving import Progress, Saver

RECORD = {"global_step": 3, "metrics_length": 0, "epoch_metrics": {}}


def zipped(content) -> bytes:
    path = Path("checkpoint.pt")
    torch.save(content, path)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda: b"", "it is empty"),
        (lambda: b"no checkpoint", "its 13 bytes are not a file of PyTorch"),
        (lambda: pickle.dumps(Path("x"), protocol=2), "holds more than tensors and plain values, which is not read"),
        (lambda: zipped({"a": torch.ones(1000)})[:2000], "its 2000 bytes are damaged, or only a part"),
        (lambda: zipped({"a": torch.ones(1000)})[:-3], r"its \d+ bytes are damaged, or only a part"),
        (
            lambda: zipped({"a": Path("x")}),
            "holds more than tensors and plain values, which is not read since it could",
        ),
    ],
)
def test_what_cannot_be_read(content, said):
    Path("checkpoint.pt").write_bytes(content())
    with pytest.raises(
        CheckpointError, match=rf"checkpoint\.pt is no readable checkpoint: .*{said}.*; choose another --output"
    ) as found:
        load_checkpoint(Path("checkpoint.pt"))
    assert "\n" not in str(found.value)
    assert "weights_only" not in str(found.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.ones(3, 4), r"a tensor of shape \(3, 4\)"),
        ([1, 2], "a list"),
        ({}, "an empty dict"),
        ({"state_dict": {}, "arch": "resnet50"}, r"a dict of state_dict, arch\."),
        (
            {f"layer{number}": 1 for number in range(9)},
            r"a dict of layer0, layer1, layer2, layer3, layer4 and 4 more\.",
        ),
        ({"format": 1, "learner": {}}, f"format 1, and this is format {FORMAT}"),
    ],
)
def test_what_is_not_ours(content, said):
    torch.save(content, "checkpoint.pt")
    with pytest.raises(CheckpointError, match=f"was not written by this version of pcl_fast: it holds {said}"):
        load_checkpoint(Path("checkpoint.pt"))


def test_what_lacks_something(tmp_path, alone):
    config = small_config(output=tmp_path)
    save_checkpoint(tmp_path, {"config": {}, "epoch": 3})
    missing = ", ".join(part for part in PARTS if part not in ("config", "epoch"))
    with pytest.raises(CheckpointError, match=f"has no {missing}; choose another --output"):
        Saver(config, "these images", alone).restore(learner_of(config, alone))


def test_every_part_is_saved(tmp_path, alone):
    learner = learner_of(small_config(output=tmp_path), alone)
    Saver(learner.config, "these images", alone).save(learner, Progress(0, 3), RECORD)
    assert load_checkpoint(tmp_path).keys() == {"format", *PARTS}
