"""The detectors: what is under them is the checkpoint's ResNet, and what of it is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from detectors import small_detector, small_resnet
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from pcl_fast.config import ModelConfig
from pcl_fast.errors import CheckpointError
from pcl_fast.evaluation.detection.model import FixedBatchNorm, build_detector, check_body
from pcl_fast.nn.batch_norm import split_batch_norm
from pcl_fast.nn.encoder import Encoder


@pytest.fixture(scope="module")
def backbone():
    return small_resnet()


@pytest.mark.parametrize(("masks", "frozen"), [(False, True), (True, False)])
def test_the_body_has_the_checkpoint_s_tensors(backbone, masks, frozen):
    before = copy.deepcopy(backbone.state_dict())
    detector = small_detector(backbone, masks=masks, frozen=frozen)
    body = detector.backbone.body.state_dict()
    assert body.keys() == {name for name in before if "num_batches" not in name}
    assert all(torch.equal(body[name], before[name]) for name in body)
    assert len(body) == check_body(detector, backbone) == 100
    # It is a copy.
    detector.backbone.body.conv1.weight.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_the_body_computes_what_the_backbone_does(backbone):
    """In training mode too, since nothing there depends on it."""
    detector = small_detector(backbone).train()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = {}
    for number in (1, 2, 3, 4):
        layer = getattr(backbone, f"layer{number}")
        layer.register_forward_hook(lambda _, inputs, output, name=str(number - 1): expected.update({name: output}))
    backbone(images)
    found = detector.backbone.body(images)
    assert found.keys() == expected.keys() == {"0", "1", "2", "3"}
    for name, feature in found.items():
        torch.testing.assert_close(feature, expected[name])


def test_batch_norm_in_parts_is_fixed_too(backbone):
    """As --model.bn-splits leaves it."""
    parts = copy.deepcopy(backbone)
    split_batch_norm(parts, 2)
    detector = small_detector(parts)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.backbone.body.modules())
    assert check_body(detector, backbone) == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_batch_norm_is_torchvision_s(dtype):
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(5, generator=generator) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")
    }
    ours, theirs = FixedBatchNorm(5, eps=1e-3), FrozenBatchNorm2d(5, eps=1e-3)
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, 3, 4, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(2, 5, 3, 4, generator=generator)
    y, expected = ours(x), theirs(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected.float(), rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    gradient, wanted = (torch.autograd.grad((value.float() * upstream).sum(), x)[0] for value in (y, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


def test_what_is_trained(backbone):
    frozen, tuned = (dict(small_detector(backbone, frozen=frozen).named_parameters()) for frozen in (True, False))
    assert [name for name, p in frozen.items() if not p.requires_grad] == [
        name for name in frozen if name.startswith("backbone.body.")
    ]
    assert all(parameter.requires_grad for parameter in tuned.values())
    assert {name for name in tuned if ".body.bn" in name or ".bn1." in name} == set()
    assert "backbone.body.conv1.weight" in tuned


def test_boxes_are_exact_under_autocast(backbone):
    """In bfloat16 anchors beyond 256 pixels would be at even places only, and so would boxes."""
    detector = build_detector(backbone, 2, masks=False, frozen=True, min_size=160, max_size=320).eval()
    detector.roi_heads.score_thresh = 0
    detector.rpn._post_nms_top_n["testing"] = 20
    anchors = []
    detector.rpn.anchor_generator.register_forward_hook(lambda module, inputs, outputs: anchors.extend(outputs))
    image = torch.rand(3, 80, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        detector([image])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (found,) = detector([image])
    assert torch.equal(*anchors)
    boxes = found["boxes"]
    assert boxes.dtype == torch.float32
    assert (boxes != boxes.bfloat16()).float().mean() > 0.5


def test_a_changed_body_is_noticed(backbone):
    detector = small_detector(backbone)
    detector.backbone.body.layer3[1].bn2.running_var[3] += 1e-6
    with pytest.raises(RuntimeError, match=r"1 of 100 tensors .* layer3.1.bn2.running_var"):
        check_body(detector, backbone)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (ModelConfig(arch="cifar_resnet8"), "wants a ResNet with torchvision's layers"),
        (ModelConfig(arch="resnet18", small_stem=True), "has the small stem"),
    ],
)
def test_small_resnets_are_refused(model, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        build_detector(Encoder(model).backbone, 2, masks=False, frozen=True, min_size=64, max_size=96)
