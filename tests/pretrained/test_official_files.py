"""Checkpoints in the format of the official PCL and MoCo."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torchvision
from foreign import IMAGES, official, prefixed, resnet, without_classifier
from torch import nn

from pcl_fast.errors import CheckpointError
from pcl_fast.pretrained import read_pretrained


@torch.inference_mode()
def official_features(path, mlp: bool, prefix: str) -> torch.Tensor:
    """As the official evaluation builds the network and loads it."""
    state = torch.load(path, weights_only=True)["state_dict"]
    network = torchvision.models.resnet18(num_classes=16)
    if mlp:
        network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), network.fc)
    stripped = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    network.load_state_dict(stripped, strict=True)
    return network.eval()(IMAGES)


@pytest.mark.parametrize("mlp", [False, True], ids=["v1", "v2"])
def test_features_are_those_of_the_network_that_was_asked_for(tmp_path, mlp):
    path = official(resnet(1, mlp=mlp), resnet(2, mlp=mlp), tmp_path / "checkpoint_0199.pth.tar")
    seen = {}
    for name, prefix in (("query", "module.encoder_q."), ("momentum", "module.encoder_k.")):
        found = read_pretrained(path, name)
        assert not found.backbone.training
        with torch.inference_mode():
            seen[name] = found.head(found.backbone(IMAGES))
        assert torch.equal(seen[name], official_features(path, mlp, prefix))
        assert (found.encoder, found.arch, found.width, found.small_stem) == (name, "resnet18", 512, False)
        head = "MLP, 512 -> 512 -> 16" if mlp else "linear, 512 -> 16"
        assert found.notes[0].endswith(f"120 tensors {prefix}*; the projection head, {head}")
    assert (seen["query"] - seen["momentum"]).abs().max() > 0.1
    assert found.notes[1] == (
        f"left out: encoder_q.* ({124 if mlp else 122} tensors), queue [16, 64], queue_ptr [1], optimizer"
    )
    assert found.facts == {"epoch": 200, "arch": "resnet18"}
    assert found.checksum == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.path == path
    assert found.data is None


def test_a_file_of_pytorch_s_first_years(tmp_path):
    """Not a zip yet, and without the counters that batch norm got later."""
    query, momentum = resnet(1), resnet(2)
    expected = official_features(official(query, momentum, tmp_path / "new.pth.tar"), False, "module.encoder_q.")
    for network in (query, momentum):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None
    path = official(query, momentum, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    found = read_pretrained(path, "query")
    assert "from 100 tensors" in found.notes[0]
    with torch.inference_mode():
        assert torch.equal(found.head(found.backbone(IMAGES)), expected)
    counters = [b for name, b in found.backbone.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counters) == 20
    assert not any(counters)


def written(path, state):
    torch.save({"state_dict": state, "arch": "resnet18"}, path)
    return path


def test_an_encoder_that_is_not_there(tmp_path):
    state = resnet().state_dict()
    alone = written(tmp_path / "q.pth.tar", prefixed("module.encoder_q.", state))
    with pytest.raises(CheckpointError, match=r"q\.pth\.tar has no momentum encoder, only query; .*_q\.\* \(122"):
        read_pretrained(alone, "momentum")
    assert read_pretrained(alone, "query").encoder == "query"


def test_a_misspelled_prefix(tmp_path):
    state = resnet().state_dict()
    wrong = prefixed("module.encoder_qq.", state)
    path = written(tmp_path / "a.pth.tar", {**wrong, **prefixed("module.encoder_k.", state)})
    with pytest.raises(CheckpointError, match=r"has no query encoder, only momentum.* encoder_qq\.\* \(122 tensors\)"):
        read_pretrained(path, "query")
    with pytest.raises(CheckpointError, match=r"holds no ResNet .* encoder_qq\.\* \(122 tensors\)\. Names may begin"):
        read_pretrained(written(tmp_path / "b.pth.tar", wrong), "query")


def test_a_head_that_is_not_theirs(tmp_path):
    backbone = without_classifier(resnet())

    def refused(**head):
        state = prefixed("module.encoder_q.", {**backbone, **head})
        with pytest.raises(CheckpointError) as error:
            read_pretrained(written(tmp_path / "head.pth.tar", state), "query")
        return str(error.value)

    said = refused(**{"fc.weight": torch.zeros(16, 512)})
    assert said.endswith("nor two with a ReLU between them: weight [16, 512]")
    said = refused(**{"fc.weight": torch.zeros(16, 256), "fc.bias": torch.zeros(16)})
    assert said.endswith("of another shape: module.encoder_q.fc.weight [16, 256], not [16, 512]")
    mlp = {"fc.0.weight": torch.zeros(32, 512), "fc.0.bias": torch.zeros(32), "fc.2.weight": torch.zeros(16, 32)}
    assert refused(**mlp).endswith("them: 0.weight [32, 512], 0.bias [32], 2.weight [16, 32]")
    said = refused(**mlp, **{"fc.2.bias": torch.zeros(8)})
    assert said.endswith("of another shape: module.encoder_q.fc.2.bias [8], not [16]")
