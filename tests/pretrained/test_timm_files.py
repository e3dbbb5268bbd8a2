"""Weights as timm keeps them: a file of safetensors, or a folder for the hub."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from foreign import IMAGES, pooled, resnet

from pcl_fast.config import DataConfig
from pcl_fast.errors import CheckpointError
from pcl_fast.pretrained import THE_ONLY_ONE, read_pretrained

CONFIG = {
    "architecture": "resnet18",
    "num_classes": 16,
    "num_features": 512,
    "pretrained_cfg": {
        "tag": "a1_in1k",
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "first_conv": "conv1",
        "classifier": "fc",
    },
}


def written(path, network) -> None:
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})


@pytest.fixture
def hub(tmp_path):
    """Write a folder for the hub."""
    written(tmp_path / "model.safetensors", resnet(1))

    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def test_a_folder_for_the_hub(hub):
    folder = hub(CONFIG)
    found = read_pretrained(folder, "momentum")
    assert (found.encoder, found.arch, found.head) == (THE_ONLY_ONE, "resnet18", None)
    assert found.path == folder / "model.safetensors"
    assert found.source == "timm's resnet18.a1_in1k"
    assert found.data == DataConfig(size=224, resize=235)
    assert found.notes[1] == "left out: fc.bias [16], fc.weight [16, 512]"
    assert found.notes[2] == "timm resizes its images with bicubic, here bilinear"
    with torch.inference_mode():
        assert torch.equal(found.backbone(IMAGES), pooled(resnet(1)))


def test_a_file_by_itself(tmp_path):
    written(tmp_path / "resnet18.safetensors", resnet(1))
    found = read_pretrained(tmp_path / "resnet18.safetensors", "query")
    assert (found.encoder, found.source, found.data) == (THE_ONLY_ONE, "a ResNet's weights", None)
    with torch.inference_mode():
        assert torch.equal(found.backbone(IMAGES), pooled(resnet(1)))


def test_an_older_configuration(hub):
    """All in one, and not all of it."""
    found = read_pretrained(hub({"architecture": "resnet18", "crop_pct": None, "input_size": [3, 160, 160]}), "query")
    assert found.data == DataConfig(size=160, resize=182)
    assert found.source == "timm's resnet18"


def test_a_configuration_that_is_not_timm_s(hub):
    """Beside a run's own, for one."""
    assert read_pretrained(hub({"preset": "pcl_v2", "model": {}}), "query").data is None


def changed(**changes):
    config = copy.deepcopy(CONFIG)
    config["pretrained_cfg"] |= changes.pop("pretrained_cfg", {})
    return config | changes


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed(architecture="resnetblur18"), r"names resnetblur18, which is not resnet18, though its tensors have"),
        (changed(pretrained_cfg={"mean": [0.5, 0.5, 0.5]}), r"wants images normalised with mean \[0.5, 0.5, 0.5\]"),
        (changed(pretrained_cfg={"std": [0.5, 0.5, 0.5]}), r"wants images normalised with std \[0.5, 0.5, 0.5\]"),
        (changed(model_args={"num_classes": 3, "output_stride": 8}), r"it was built with \{'output_stride': 8\}"),
        (changed(global_pool="max"), r"it was built with \{'global_pool': 'max'\}"),
        (changed(pretrained_cfg={"input_size": 224}), r"config\.json is not as timm writes it \(TypeError"),
    ],
)
def test_a_network_that_computes_something_else(hub, config, said):
    with pytest.raises(CheckpointError, match=said):
        read_pretrained(hub(config), "query")


def test_a_broken_configuration(hub):
    folder = hub({})
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not as timm writes it"):
        read_pretrained(folder, "query")
