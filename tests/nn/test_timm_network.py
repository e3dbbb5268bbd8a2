"""timm's networks as backbones."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pcl_fast.config import ModelConfig
from pcl_fast.errors import MissingPackageError
from pcl_fast.nn.batch_norm import SplitBatchNorm, fold_batch_norm, has_batch_norm
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.feature_pass import fused_encoder, fused_layers
from pcl_fast.nn.fused_batch_norm import fuse_batch_norm, unfuse_batch_norm
from pcl_fast.nn.fusion import use
from pcl_fast.nn.sync_batch_norm import SyncBatchNorm2d, sync_batch_norm
from pcl_fast.nn.timm_network import check_image_sizes
from pcl_fast.planning.encoder import count

timm = pytest.importorskip("timm", reason="timm is not installed")

RESNET, CONVNEXT, VIT, MOBILE = (
    "timm/resnet10t",
    "timm/convnext_atto",
    "timm/vit_tiny_patch16_224",
    "timm/mobilenetv3_small_050",
)


def encoder(arch: str, **options) -> Encoder:
    """An encoder that has seen images, and so has statistics."""
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(arch=arch, dim=16, **options))
    encoder(torch.randn(6, 3, 64, 64) + 0.5)
    return encoder


IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "width", "parameters"),
    [("resnet50d", 2048, 23_527_264), ("convnext_tiny", 768, 27_820_128), ("vit_small_patch16_224", 384, 21_665_664)],
)
def test_the_networks_that_are_named_in_the_documentation(arch, width, parameters):
    """Parameters are timm's own less the classifier of 1000 classes."""
    encoder = Encoder(ModelConfig(arch=f"timm/{arch}"))
    assert encoder.width == width
    assert sum(parameter.numel() for parameter in encoder.backbone.parameters()) == parameters
    pooled, units = encoder.both(torch.randn(2, 3, 224, 224))
    assert (pooled.shape, units.shape) == ((2, width), (2, 128))


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize(("arch", "width"), [(RESNET, 512), (CONVNEXT, 320), (VIT, 192), (MOBILE, 1024)])
def test_features_are_unit_vectors(arch, width, head):
    model = Encoder(ModelConfig(arch=arch, head=head, dim=16))
    assert model.width == width
    pooled, units = model.both(torch.randn(3, 3, 48, 48))
    assert pooled.shape == (3, width)
    torch.testing.assert_close(units.norm(dim=1), torch.ones(3))


def test_weights_depend_on_the_seed_alone():
    """Not on whether the network has been looked at before."""
    torch.manual_seed(1)
    first = Encoder(ModelConfig(arch=VIT)).state_dict()
    torch.manual_seed(1)
    check_image_sizes(VIT, [32, 160])
    second = Encoder(ModelConfig(arch=VIT)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_network_takes_the_sizes_that_it_can():
    check_image_sizes("resnet50", [1])  # others are not looked at
    check_image_sizes(VIT, [32, 64, 224])
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 does not take images of 60 px .*made for 224 px"):
        check_image_sizes(VIT, [64, 60])
    with pytest.raises(ValueError, match=r"mixer_s32_224 does not take images of 64 px .*use --data.size 224"):
        check_image_sizes("timm/mixer_s32_224", [64])
    check_image_sizes("timm/mixer_s32_224", [224])


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("timm/resnet10s", "has no resnet10s; it has, for instance, .*resnet10t"),
        ("timm/resnet10t.c3_in1k", "c3_in1k names trained weights, which are not loaded; use timm/resnet10t"),
        ("timm/hf-hub:timm/resnet18", "has no hf-hub"),
    ],
)
def test_other_names_are_refused(arch, words):
    with pytest.raises(ValueError, match=words):
        Encoder(ModelConfig(arch=arch))


def test_a_small_stem_is_refused():
    with pytest.raises(ValueError, match=r"use --model\.no-small-stem"):
        Encoder(ModelConfig(arch=RESNET, small_stem=True))


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackageError, match=r'pip install "pcl-fast\[timm\]"'):
        Encoder(ModelConfig(arch=RESNET))


# --- batch norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [RESNET, MOBILE])
def test_split_batch_norm_is_that_of_the_parts(arch):
    """In training, with the activation that timm has made a part of it."""
    split, plain = encoder(arch, bn_splits=2), encoder(arch)
    plain.load_state_dict(split.state_dict())
    assert all(isinstance(norm, SplitBatchNorm) for norm in split.modules() if isinstance(norm, nn.BatchNorm2d))
    parts = torch.cat([copy.deepcopy(plain)(part) for part in IMAGES.chunk(2)])
    torch.testing.assert_close(split(IMAGES), parts)
    assert not torch.allclose(parts, plain(IMAGES), atol=1e-3)


def test_splits_without_batch_norm_are_refused():
    for arch, words in ((VIT, "has no batch norm"), ("timm/levit_128s", "does not split the BatchNorm1d")):
        with pytest.raises(ValueError, match=f"--model.bn-splits 2.*{words}.*use --model.bn-splits 1"):
            Encoder(ModelConfig(arch=arch, bn_splits=2))
    assert not has_batch_norm(Encoder(ModelConfig(arch=VIT, head="mlp")))


@pytest.mark.parametrize("arch", [RESNET, MOBILE])
def test_synchronised_batch_norm_without_other_ranks(arch):
    plain = encoder(arch)
    synchronised = copy.deepcopy(plain)
    sync_batch_norm(synchronised, None)
    norms = [norm for norm in synchronised.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(norm, SyncBatchNorm2d) for norm in norms)
    assert torch.equal(synchronised(IMAGES), plain(IMAGES))


def test_another_kind_of_batch_norm_is_not_synchronised():
    with pytest.raises(ValueError, match="does not know the network's BatchNorm3d"):
        sync_batch_norm(nn.Sequential(nn.BatchNorm3d(2)), None)


# --- faster ways ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch",
    [
        *(RESNET, CONVNEXT, VIT, MOBILE),
        *(pytest.param(f"timm/{name}", marks=pytest.mark.slow) for name in ("regnety_002", "repvgg_a0", "resnetv2_18")),
    ],
)
def test_the_feature_pass_gives_the_same_features(arch):
    """Folded and fused where the patterns are known; otherwise as they are."""
    model = encoder(arch).eval()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
        expected = model(IMAGES)
        torch.testing.assert_close(fold_batch_norm(model)(IMAGES), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused_encoder(model)(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_a_resnet_s_batch_norm_is_folded():
    norms = [module for module in fold_batch_norm(encoder(RESNET)).modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 1  # that after the deep stem, which is no convolution but several
    assert fused_layers(fused_encoder(encoder(RESNET)))


@pytest.mark.parametrize("arch", [RESNET, CONVNEXT, VIT, MOBILE])
def test_fused_batch_norm_leaves_the_bits_on_a_cpu(arch):
    model = encoder(arch)
    fused = copy.deepcopy(model)
    fuse_batch_norm(fused)
    assert torch.equal(fused(IMAGES), model(IMAGES))
    unfuse_batch_norm(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]


def test_the_triton_way_is_refused_where_no_pattern_is_found():
    with pytest.raises(ValueError, match=r"none of the patterns of torchvision's ResNets"):
        use("triton", Encoder(ModelConfig(arch=VIT)))


@pytest.mark.parametrize("arch", [RESNET, CONVNEXT, VIT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_half_precision(arch, dtype):
    """Under autocast with a gradient, and all in one type as in the feature pass."""
    model = encoder(arch, head="mlp").to(memory_format=torch.channels_last)
    exact = model(IMAGES)
    with torch.autocast("cpu", dtype=dtype):
        found = model(IMAGES.to(dtype))
    assert found.dtype is torch.float32
    assert F.cosine_similarity(found, exact).min() > 0.99
    found[:, 0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        found = fold_batch_norm(model).to(dtype)(IMAGES.to(dtype))
        assert F.cosine_similarity(found, model.eval()(IMAGES)).min() > 0.99


def test_the_planner_counts_operations():
    """A ViT-S's are known: 4.6 billion multiply-adds at 224 px, and about twice as many more backward."""
    found = count(ModelConfig(arch="timm/vit_small_patch16_224"), 224)
    assert found.forward.flop / 2 == pytest.approx(4.6e9, rel=0.01)
    for arch in (VIT, CONVNEXT, MOBILE):  # depthwise convolutions too
        found = count(ModelConfig(arch=arch), 64)
        assert 2.6 < found.training.flop / found.forward.flop < 3
    with pytest.raises(ValueError, match="does not take images of 60 px"):
        count(ModelConfig(arch=VIT), 60)
