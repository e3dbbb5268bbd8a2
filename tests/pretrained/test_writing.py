"""What is written for other libraries, loaded by each of them, computes what our encoder computes."""

from __future__ import annotations

import functools
import json
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from launches import run_here

from pcl_fast import export as command
from pcl_fast.config import DataConfig, ModelConfig
from pcl_fast.errors import MissingPackageError, UserError
from pcl_fast.nn.encoder import Encoder
from pcl_fast.pretrained import Pretrained, read_pretrained
from pcl_fast.pretrained.writing import detectron2_name, to_detectron2, to_onnx, to_timm, to_torchvision


def encoder(arch: str = "resnet18", head: str = "mlp", small_stem: bool = False) -> Pretrained:
    """Return an encoder whose batch norms have statistics, so that one that is left out is noticed."""
    torch.manual_seed(0)
    network = Encoder(ModelConfig(arch=arch, head=head, small_stem=small_stem)).eval()
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    width = next(module.in_features for module in network.head.modules() if isinstance(module, torch.nn.Linear))
    return Pretrained(
        *(network.backbone, network.head, width, arch, small_stem, "query", "a test", None, "", DataConfig(size=64)),
        notes=(),
        facts={},
    )


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(pretrained: Pretrained, of: torch.Tensor) -> torch.Tensor:
    return pretrained.backbone(of)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_loads_all_but_its_classifier(arch, tmp_path):
    ours, file = encoder(arch), tmp_path / "weights.pth"
    to_torchvision(ours, file)
    theirs = torchvision.models.get_model(arch).eval()
    found = theirs.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        assert torch.equal(theirs(images()), features(ours, images()))


def test_timm_loads_the_folder(tmp_path):
    timm = pytest.importorskip("timm")
    ours = encoder()
    to_timm(ours, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (theirs.num_classes, theirs.num_features) == (0, 512)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images()), features(ours, images()), atol=1e-5, rtol=1e-5)
    transform = timm.data.resolve_data_config({}, model=theirs)
    assert tuple(transform["input_size"]) == (3, 64, 64)
    assert transform["crop_pct"] == pytest.approx(64 / 73)
    assert transform["mean"] == pytest.approx((0.485, 0.456, 0.406))


def test_we_read_what_timm_gets(tmp_path):
    ours = encoder()
    to_timm(ours, tmp_path)
    again = read_pretrained(tmp_path, "query")
    assert (again.arch, again.data.size, again.data.resize) == ("resnet18", 64, 73)
    assert torch.equal(features(again, images()), features(ours, images()))


def names_in_detectron2(blocks: tuple[int, ...]) -> set[str]:
    """Return the names of a bottleneck ResNet's tensors, as modeling/backbone/resnet.py nests its modules."""

    def convolution(name: str) -> set[str]:
        return {f"{name}.weight", *(f"{name}.norm.{of}" for of in ("weight", "bias", "running_mean", "running_var"))}

    found = convolution("stem.conv1")
    for stage, count in enumerate(blocks, start=2):
        for block in range(count):
            inner = ["conv1", "conv2", "conv3", *(["shortcut"] if block == 0 else [])]
            found.update(*(convolution(f"res{stage}.{block}.{name}") for name in inner))
    return found


def test_detectron2_finds_its_names(tmp_path):
    ours, file = encoder("resnet50"), tmp_path / "r50.pkl"
    to_detectron2(ours, file)
    content = pickle.loads(file.read_bytes())
    assert content["matching_heuristics"] is True
    assert content["model"].keys() == names_in_detectron2((3, 4, 6, 3))
    state = ours.backbone.state_dict()
    for name in ("conv1.weight", "bn1.running_var", "layer2.0.downsample.1.bias", "layer4.2.bn3.weight"):
        np.testing.assert_array_equal(content["model"][detectron2_name(name)], state[name].numpy())
    assert detectron2_name("layer2.0.downsample.1.bias") == "res3.0.shortcut.norm.bias"
    assert all(type(array) is np.ndarray and array.dtype == np.float32 for array in content["model"].values())


@pytest.mark.parametrize(("head", "small_stem"), [("mlp", False), ("mlp_bn", True)])
def test_onnxruntime_computes_the_same(head, small_stem, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    ours, file = encoder(head=head, small_stem=small_stem), tmp_path / "encoder.onnx"
    to_onnx(ours, file)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["features", "embedding"]
    for size in (64, 96):  # another one than it was traced with
        found, unit = session.run(None, {"images": images(size).numpy()})
        expected = features(ours, images(size))
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            np.testing.assert_allclose(unit, F.normalize(ours.head(expected), dim=1).numpy(), atol=1e-4)


def test_onnx_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match=r'needs the package onnx: pip install "pcl-fast\[onnx\]"'):
        to_onnx(encoder(), tmp_path / "encoder.onnx")


@pytest.mark.parametrize("write", [to_torchvision, to_timm, to_detectron2])
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"arch": "cifar_resnet8"}, "has no cifar_resnet8"), ({"small_stem": True}, "has no resnet18 with a stem")],
)
def test_networks_that_the_library_lacks_are_refused(write, options, reason, tmp_path):
    with pytest.raises(UserError, match=f"{reason}.*--to onnx"):
        write(encoder(**options), tmp_path / "out")
    assert not list(tmp_path.iterdir())


run = functools.partial(run_here, command.main)


def test_the_command_keeps_what_is_there(tmp_path, capsys):
    weights, file = tmp_path / "r18.pth", tmp_path / "out.pth"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    file.write_text("mine")
    assert run(weights, "--to", "torchvision", "--output", file) == (
        f"pcl_fast.export: --output {file} is there already; choose another place, or overwrite it with --force"
    )
    assert file.read_text() == "mine"
    assert run(weights, "--to", "torchvision", "--output", file, "--force") is None
    assert f"written: {file}" in capsys.readouterr().out
    assert set(torch.load(file, weights_only=True)) <= set(torchvision.models.resnet18().state_dict())


def test_the_command_writes_timm_s_folder(tmp_path):
    weights, folder = tmp_path / "r18.pth", tmp_path / "new" / "hub"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    assert run(weights, "--to", "timm", "--output", folder) is None
    assert json.loads((folder / "config.json").read_text())["architecture"] == "resnet18"
    assert "is there already" in run(weights, "--to", "timm", "--output", folder)


def test_a_checkpoint_that_is_not_there_is_said(tmp_path):
    assert "is not there" in run(tmp_path / "none", "--to", "onnx", "--output", tmp_path / "x.onnx")
