"""Files with torchvision's names: torchvision's own, SwAV's, Barlow Twins', DINO's, however they are wrapped."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import IMAGES, pooled, prefixed, resnet, without_classifier

from pcl_fast.config import ModelConfig
from pcl_fast.nn.encoder import build_backbone, resnet_names
from pcl_fast.pretrained import THE_ONLY_ONE, Pretrained, read_pretrained
from pcl_fast.pretrained.architectures import architecture


def torchvision_s(network):
    return network.state_dict(), "left out: fc.weight [16, 512], fc.bias [16]"


def torchvision_s_training(network):
    """As its reference scripts save it."""
    content = {"model": network.state_dict(), "optimizer": {}, "epoch": 89, "args": argparse.Namespace(lr=0.1)}
    return content, "left out: fc.weight [16, 512], fc.bias [16], optimizer, args"


def published(network):
    """DINO's, VICReg's and Barlow Twins' resnet50.pth."""
    return without_classifier(network), "left out: nothing"


def swav(network):
    state = prefixed("module.", without_classifier(network))
    state["module.projection_head.0.weight"] = torch.zeros(32, 512)
    state["module.projection_head.1.running_mean"] = torch.zeros(32)
    state["module.projection_head.3.weight"] = torch.zeros(16, 32)
    state["module.prototypes.weight"] = torch.zeros(30, 16)
    return state, "left out: projection_head.* (3 tensors), prototypes.weight [30, 16]"


def barlow_twins(network):
    state = prefixed("module.backbone.", without_classifier(network))
    state |= {"module.projector.0.weight": torch.zeros(32, 512), "module.bn.running_mean": torch.zeros(32)}
    content = {"epoch": 89, "model": state, "optimizer": {"param_groups": [{"lr": 0.1}]}}
    return content, "left out: projector.0.weight [32, 512], bn.running_mean [32], optimizer"


def linear_evaluation(network):
    """MoCo's and PCL's, whose encoder is frozen below a classifier."""
    content = {
        "epoch": 89,
        "arch": "resnet18",
        "state_dict": prefixed("module.", network.state_dict()),
        "best_acc1": 60,
    }
    return content, "left out: fc.weight [16, 512], fc.bias [16], best_acc1"


def lone_teacher(network):
    return {"teacher": prefixed("backbone.", without_classifier(network))}, "left out: nothing"


@pytest.mark.parametrize("name", ["query", "momentum"])
@pytest.mark.parametrize(
    "layout",
    [torchvision_s, torchvision_s_training, published, swav, barlow_twins, linear_evaluation, lone_teacher],
    ids=lambda layout: layout.__name__,
)
def test_a_single_encoder_is_found(tmp_path, layout, name):
    content, left_out = layout(resnet(1))
    torch.save(content, tmp_path / "weights.pth")
    found = read_pretrained(tmp_path / "weights.pth", name)
    assert (found.encoder, found.arch, found.width, found.head) == (THE_ONLY_ONE, "resnet18", 512, None)
    assert found.notes[1] == left_out
    assert re.fullmatch(
        r"loaded: the backbone, resnet18, from 120 tensors( [a-z.]+\.\*)?; no projection head", found.notes[0]
    )
    assert found.facts == {key: content[key] for key in ("epoch", "arch") if key in content}
    same(found, resnet(1))


@torch.inference_mode()
def same(found: Pretrained, network) -> None:
    assert not any(module.training for module in found.backbone.modules())
    assert torch.equal(found.backbone(IMAGES), pooled(network))


def dino(path: Path, student, teacher) -> Path:
    """Its full checkpoint, whose optimiser has learning rates out of an array."""
    head = {"module.head.last_layer.weight_g": torch.ones(4, 1)}
    content = {
        "student": prefixed("module.backbone.", without_classifier(student)) | head,
        "teacher": prefixed("module.backbone.", without_classifier(teacher)) | head,
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.3), "step": np.int64(2)}]},
        "epoch": 800,
        "args": argparse.Namespace(arch="resnet50", lr=0.3, crops=(0.4, 1.0)),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("name", "seed", "other"), [("query", 1, "teacher"), ("momentum", 2, "student")])
def test_dino_s_student_and_teacher(tmp_path, name, seed, other):
    found = read_pretrained(dino(tmp_path / "checkpoint.pth", resnet(1), resnet(2)), name)
    assert (found.encoder, found.head, found.facts) == (name, None, {"epoch": 800})
    left_out = f"left out: head.last_layer.weight_g [4, 1], {other}, optimizer, args, dino_loss"
    assert found.notes[1] == left_out
    same(found, resnet(seed))


def test_numpy_s_old_names(tmp_path):
    """What numpy 1 has pickled and numpy 2 calls otherwise, and the other way round."""
    path = tmp_path / "checkpoint.pth"
    content = {"state_dict": without_classifier(resnet(1)), "lr": np.float64(0.3)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    here, other = sorted([b"numpy.core", b"numpy._core"], key=lambda name: name not in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(here + b".multiarray", other + b".multiarray"))
    assert other + b".multiarray" in path.read_bytes()
    same(read_pretrained(path, "query"), resnet(1))


def test_half_precision_becomes_single(tmp_path):
    state = {
        name: value.half() if value.is_floating_point() else value for name, value in resnet(1).state_dict().items()
    }
    torch.save(state, tmp_path / "half.pth")
    found = read_pretrained(tmp_path / "half.pth", "query")
    assert {parameter.dtype for parameter in found.backbone.parameters()} == {torch.float32}
    expected = resnet(1).state_dict()["layer4.1.conv2.weight"].half().float()
    assert torch.equal(found.backbone.layer4[1].conv2.weight, expected)


def test_nothing_is_shared_between_tensors(tmp_path):
    """What is one memory in a file is not in the network, which may be fine-tuned."""
    torch.save(resnet(1).state_dict(), tmp_path / "weights.pth")
    weight = read_pretrained(tmp_path / "weights.pth", "query").backbone.conv1.weight
    assert weight.requires_grad
    with torch.no_grad():
        weight[:, 0] += 1
    assert not torch.equal(weight[:, 0], weight[:, 1])


@pytest.mark.parametrize("arch", resnet_names())
@pytest.mark.parametrize("likely", [None, "resnet34"])
def test_every_architecture_has_its_shapes(arch, likely):
    with torch.device("meta"):
        state = build_backbone(ModelConfig(arch=arch))[0].state_dict()
    assert architecture(state, file=Path("x"), likely=likely) == arch
