"""Files after which something would be random, or that hold something else, are refused in words."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from foreign import prefixed, resnet, without_classifier

from pcl_fast.errors import CheckpointError
from pcl_fast.pretrained import read_pretrained


@pytest.fixture
def refused(tmp_path):
    """Write what is given, and return why it is refused."""

    def refuse(content, **how) -> str:
        path = tmp_path / "file.pth"
        torch.save(content, path, **how)
        with pytest.raises(CheckpointError) as error:
            read_pretrained(path, "query")
        assert str(path) in str(error.value)
        return str(error.value)

    return refuse


@pytest.fixture
def state():
    return resnet().state_dict()


def test_a_missing_layer(refused, state):
    del state["layer4.1.bn2.running_var"]
    assert refused(state).endswith("The nearest is resnet18, but missing: layer4.1.bn2.running_var [512]")
    del state["conv1.weight"]
    said = refused({"state_dict": prefixed("module.backbone.", state)})
    assert "missing: module.backbone.conv1.weight [64, 3, 7, 7], module.backbone.layer4.1.bn2" in said


@pytest.mark.parametrize("name", ["layer1.0.se.fc1.weight", "conv2.weight", "layer5.0.conv1.weight", "norm.weight"])
def test_a_layer_too_many(refused, state, name):
    state[name] = torch.zeros(4, 64)
    assert refused(state).endswith(f"The nearest is resnet18, but left over: {name} [4, 64]")


def test_a_layer_too_many_within_an_encoder(refused, state):
    state["head.weight"] = torch.zeros(4, 64)
    said = refused({"state_dict": prefixed("module.encoder_q.", state)})
    assert said.endswith("The nearest is resnet18, but left over: module.encoder_q.head.weight [4, 64]")


def test_a_misspelled_layer(refused, state):
    state["layer3.0.conv1.wieght"] = state.pop("layer3.0.conv1.weight")
    said = refused(state)
    assert "missing: layer3.0.conv1.weight [256, 128, 3, 3]; left over: layer3.0.conv1.wieght [256" in said


def test_another_shape(refused, state):
    state["layer2.0.conv1.weight"] = torch.zeros(128, 64, 1, 1)
    assert refused(state).endswith("but of another shape: layer2.0.conv1.weight [128, 64, 1, 1], not [128, 64, 3, 3]")


def test_a_wider_network_names_only_the_first(refused, state):
    wide = {name: torch.cat([value, value]) if value.dim() else value for name, value in state.items()}
    said = refused(wide)
    assert "of another shape: conv1.weight [128, 3, 7, 7], not [64, 3, 7, 7], bn1.weight [128], not [64]" in said
    assert said.endswith("and 92 more")


def test_a_stem_for_small_images(refused, state):
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    said = refused({"state_dict": prefixed("backbone.", state)})
    assert "Its backbone.conv1.weight [64, 3, 3, 3] is a stem for small images, which only this project's own" in said


def test_a_classifier_alone(refused):
    said = refused({"state_dict": {"module.fc.weight": torch.zeros(1000, 512), "module.fc.bias": torch.zeros(1000)}})
    assert "holds no ResNet with torchvision's names, it has state_dict: fc.weight [1000, 512], fc.bias [1000]" in said


def test_another_kind_of_network(refused):
    blocks = {f"blocks.{n}.attn.qkv.weight": torch.zeros(6, 2) for n in range(12)}
    said = refused({"cls_token": torch.zeros(1, 1, 2), "pos_embed": torch.zeros(1, 5, 2), **blocks})
    assert "it has cls_token [1, 1, 2], pos_embed [1, 5, 2], blocks.* (12 tensors). Names may begin with" in said


def test_two_of_which_nothing_says_which(refused, state):
    said = refused({"model": state, "state_dict": state})
    assert "holds a ResNet under state_dict and model; write the one that is meant into a file of its own" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(3), "holds a Tensor, not tensors by name"),
        ({"epoch": 3, "best": 0.5}, "holds no tensors by name; it has epoch, best"),
        ({"state_dict": OrderedDict()}, "holds no tensors by name; it has state_dict"),
    ],
)
def test_no_state(refused, content, said):
    assert refused(content).endswith(said)


class Settings:
    """What unpickling would have to import."""


@pytest.mark.parametrize(
    ("content", "how", "named"),
    [
        ({"settings": Settings()}, {}, "test_refused_files.Settings"),
        ({"means": np.zeros(3)}, {}, "multiarray._reconstruct"),
        (torch.nn.Linear(2, 2), {}, "torch.nn.modules.linear.Linear"),
        (torch.nn.Linear(2, 2), {"_use_new_zipfile_serialization": False}, "torch.nn.modules.linear.Linear"),
        pytest.param(
            {"epoch": 3},
            {"pickle_protocol": 4},
            "a newer pickle",
            marks=pytest.mark.filterwarnings("ignore:Detected pickle protocol 4"),
        ),
    ],
)
def test_code_is_not_run_and_how_to_convert_is_said(refused, content, how, named):
    said = refused(content, **how)
    assert f"{named}). It is not read, because that would run whatever code the file brings" in said
    assert 'torch.save(content["state_dict"], "tensors.pth")' in said


def test_a_file_that_runs_a_command_does_not(refused, tmp_path):
    class Evil:
        def __reduce__(self):
            return __import__("os").mkdir, (str(tmp_path / "ran"),)

    assert "mkdir)" in refused({"state_dict": {}, "lr": Evil()})
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read(tmp_path, state):
    def refused(path) -> str:
        with pytest.raises(CheckpointError) as error:
            read_pretrained(path, "query")
        return str(error.value)

    assert refused(tmp_path / "none.pth") == (
        f"{tmp_path / 'none.pth'} holds no checkpoint, it is not there; give a run's folder, or a checkpoint's file"
    )
    assert refused(tmp_path) == (
        f"{tmp_path} holds no checkpoint, neither a run's (checkpoint.pt) nor timm's (model.safetensors)"
    )
    (tmp_path / "a.pth").write_text("<!DOCTYPE html>")
    assert "a.pth is no" in refused(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_text("")
    assert refused(tmp_path / "b.pth") == f"{tmp_path / 'b.pth'} is no readable checkpoint: it is empty"
    (tmp_path / "c.safetensors").write_text("<!DOCTYPE html>")
    assert "c.safetensors is no readable safetensors file" in refused(tmp_path / "c.safetensors")
    torch.save(without_classifier(resnet()), tmp_path / "d.pth")
    content = (tmp_path / "d.pth").read_bytes()
    for left in (len(content) - 500, 5000):
        (tmp_path / "d.pth").write_bytes(content[:left])
        said = f"d.pth is no readable checkpoint: its {left} bytes are damaged, or only a part"
        assert refused(tmp_path / "d.pth").endswith(said)
    (tmp_path / "d.pth").write_bytes(content[:-90_000] + bytes(9) + content[-90_000 + 9 :])
    assert "bytes are damaged: those of d/data/" in refused(tmp_path / "d.pth")
