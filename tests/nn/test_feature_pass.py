"""Fused convolutions, and encoders made of them, against the separate steps and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pcl_fast.config import ModelConfig
from pcl_fast.nn import fused_convolution
from pcl_fast.nn.batch_norm import fold_batch_norm
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.feature_pass import BiasReLU, find_difference, fused_encoder, fused_layers, join_biases, unfit_layers
from pcl_fast.nn.fused_convolution import FusedConvolution, cudnn_convolution_relu

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")


def seen(encoder: nn.Module) -> nn.Module:
    """Return an encoder that has seen images, and so has statistics; every channel has a bias of its own."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -1, 1)
    encoder(channels_last(torch.randn(4, 3, 32, 32) + 0.5))
    return encoder


def small() -> nn.Module:
    return seen(Encoder(ModelConfig(dim=16, arch="cifar_resnet8", head="mlp_bn", bn_splits=2)))


class Unit(nn.Module):
    """A ResNet of four blocks, with a stem for photographs, and unit features."""

    def __init__(self, block: type[nn.Module], **options):
        super().__init__()
        self.backbone = ResNet(block, [1, 1, 1, 1], num_classes=16, **options)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.backbone(images), dim=1)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(memory_format=torch.channels_last)


def images(rows: int = 3, side: int = 32) -> torch.Tensor:
    return channels_last(torch.randn(rows, 3, side, side))


# --- a layer ------------------------------------------------------------------------------------------------------


def layer(conv: nn.Conv2d) -> FusedConvolution:
    conv.requires_grad_(False).__class__ = FusedConvolution
    return conv


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize(
    ("rows", "side", "conv"),
    [
        (1, 7, {"in_channels": 3, "out_channels": 8, "kernel_size": 7, "stride": 2, "padding": 3}),
        (3, 9, {"in_channels": 24, "out_channels": 40, "kernel_size": 3, "padding": 1, "stride": 2}),
        (2, 5, {"in_channels": 512, "out_channels": 32, "kernel_size": 1}),
        (2, 1, {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1}),
        (2, 8, {"in_channels": 32, "out_channels": 32, "kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4}),
    ],
    ids=str,
)
def test_a_layer_is_as_exact_as_its_steps(rows, side, conv, shortcut):
    """By oneDNN, and by the operator, here without cuDNN. The shortcut stays as it is, unless it may be overwritten."""
    fused = layer(nn.Conv2d(**conv))
    x = channels_last(torch.randn(rows, conv["in_channels"], side, side) + 1)
    plain = F.conv2d(x, fused.weight, fused.bias, *fused.geometry)
    residual = channels_last(torch.randn_like(plain)) if shortcut else None
    kept = None if residual is None else residual.clone()
    exact = F.conv2d(x.double(), fused.weight.double(), fused.bias.double(), *fused.geometry)
    exact = (exact if residual is None else exact + residual.double()).relu()
    tensors = x, fused.weight, fused.bias, residual
    allowed = (fused.plain(x, residual).double() - exact).abs().max() + 2e-6 * exact.max()
    for found in (fused(x, residual), torch.ops.pcl_fast.convolution_relu(*tensors, *fused.geometry)):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found.double() - exact).abs().max() <= allowed
    if residual is not None:
        assert torch.equal(residual, kept)
        fused.overwrites = True
        found = fused(x, residual)
        assert (found.double() - exact).abs().max() <= allowed
        assert torch.equal(residual, found)


def test_the_weights_that_are_kept_follow_the_module():
    fused, x = layer(nn.Conv2d(8, 8, 3)), channels_last(torch.randn(2, 8, 6, 6))
    fused(x)
    fused.weight.mul_(2)
    fused.to(torch.float64).to(torch.float32)
    torch.testing.assert_close(fused(x), fused.plain(x))


def test_in_other_types_it_computes_in_steps():
    fused, x = layer(nn.Conv2d(8, 8, 3)), torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x.bfloat16()), fused.plain(x.bfloat16()))
    assert torch.equal(fused.double()(x.double()), fused.plain(x.double()))


def test_the_operator_is_sound():
    """Its schema and fake tensors are right, and torch.compile can trace it."""
    x, weight, bias = channels_last(torch.randn(2, 6, 9, 7)), torch.randn(4, 3, 3, 3), torch.randn(4)
    geometry = [2, 1], [1, 0], [1, 2], 2
    residual = F.conv2d(x, weight, None, *geometry)
    for arguments in ((x, weight, bias, None), (x, weight, None, residual)):
        torch.library.opcheck(
            torch.ops.pcl_fast.convolution_relu.default,
            (*arguments, *geometry),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_what_cudnn_does_not_have_is_done_in_steps():
    """As on a GPU whose cuDNN refuses; here there is no cuDNN at all."""
    x, weight, bias = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 1, 1), torch.randn(8)
    arguments = x, weight, bias, None, [1, 1], [0, 0], [1, 1], 1
    with pytest.warns(UserWarning, match=r"no fused convolution of \(2, 8, 5, 5\) with \(8, 8, 1, 1\), done in steps"):
        assert fused_convolution._tried(lambda: cudnn_convolution_relu(*arguments), x, weight) is None


def test_what_onednn_does_not_have_is_done_in_steps(monkeypatch):
    """As for a last batch that is smaller than the one that was tried."""
    fused, x = layer(nn.Conv2d(8, 8, 1)), channels_last(torch.randn(2, 8, 5, 5))
    residual = channels_last(torch.randn(2, 8, 5, 5))

    def fail(*_):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(FusedConvolution, "fast", fail)
    with pytest.warns(UserWarning, match=r"no fused convolution of .*, done in steps \(could not create a primitive\)"):
        assert torch.equal(fused(x, residual), fused.plain(x, residual))


# --- an encoder ---------------------------------------------------------------------------------------------------

ENCODERS = {
    "basic": (lambda: seen(Unit(BasicBlock)), 9),
    "bottleneck": (lambda: seen(Unit(Bottleneck, width_per_group=16)), 13),
    "cifar": (small, 7),
}


@pytest.fixture(scope="module", params=ENCODERS)
def made(request) -> tuple[nn.Module, int]:
    make, layers = ENCODERS[request.param]
    return make(), layers


def test_a_fused_encoder_computes_the_same_features(made):
    """All but the shortcuts' convolutions are fused; the encoder itself stays as it was."""
    original, layers = made
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    fused, batch = fused_encoder(original), images()
    assert len(fused_layers(fused)) == layers
    assert not any(isinstance(module, nn.ReLU) for name, module in fused.named_modules() if "backbone" in name)
    for rows in (batch, batch[:1]):
        torch.testing.assert_close(fused(rows), fold_batch_norm(original)(rows), atol=2e-6, rtol=0)
    assert original.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_it_is_found_right(made):
    assert unfit_layers(made[0], images()) == {}
    assert find_difference(made[0], images()) is None


def test_layers_that_are_named_stay(made):
    all_but = fused_layers(fused_encoder(made[0]))[1:]
    fused, batch = fused_encoder(made[0], all_but), images()
    assert len(fused_layers(fused)) == 1
    torch.testing.assert_close(fused(batch), fold_batch_norm(made[0])(batch), atol=2e-6, rtol=0)


def test_biases_of_shortcuts_can_join(made):
    fused, batch = fused_encoder(made[0]), images()
    join_biases(fused)
    convolutions = [module for module in fused.modules() if type(module) is nn.Conv2d]
    assert convolutions
    assert all(module.bias is None for module in convolutions)
    torch.testing.assert_close(fused(batch), fold_batch_norm(made[0])(batch), atol=5e-6, rtol=0)


def test_pooling_before_bias_and_relu_is_exact():
    """The stem as on a GPU. With all other layers as they are, the bits are the same."""
    original, batch = seen(Unit(BasicBlock)), images(side=35)
    fused = fused_encoder(original, fused_layers(fused_encoder(original)))
    assert sum(isinstance(module, BiasReLU) for module in fused.modules()) == 1
    assert torch.equal(fused(batch), fold_batch_norm(original)(batch))


def test_shortcuts_that_are_read_later_are_not_overwritten():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.relu = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU()

        def forward(self, x):
            shortcut = self.relu(self.first(x))
            return self.relu(self.second(shortcut.tanh()) + shortcut) - 3 * shortcut

    module, batch = Twice().to(memory_format=torch.channels_last), images()
    fused = fused_encoder(module)
    assert len(fused_layers(fused)) == 2
    torch.testing.assert_close(fused(batch), module(batch))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return (x.relu() if x.mean() > 9 else x).mean((2, 3))


@pytest.mark.parametrize("other", [Untraceable, lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten())])
def test_an_encoder_without_the_patterns_is_only_folded(other):
    module, batch = other(), images()
    fused = fused_encoder(module)
    assert fused_layers(fused) == []
    assert unfit_layers(module, batch) == {}
    torch.testing.assert_close(fused(batch), module.eval()(batch))


# --- faults -------------------------------------------------------------------------------------------------------


def forgets_shortcut(layer: FusedConvolution, x, residual=None):
    return layer.plain(x)


def forgets_bias_of_a_channel(layer: FusedConvolution, x, residual=None):
    bias = layer.bias.clone()
    bias[3] = 0
    return fused_convolution.plain_convolution_relu(x, layer.weight, bias, residual, *layer.geometry)


def is_not_finite(layer: FusedConvolution, x, residual=None):
    return layer.plain(x, residual) * float("nan")


def raises(layer: FusedConvolution, x, residual=None):
    raise RuntimeError("no engine\nfor this")


@pytest.mark.parametrize(
    ("fault", "layers", "reason"),
    [
        (forgets_shortcut, 3, "is wrong: "),
        (forgets_bias_of_a_channel, 7, "is wrong: 1 of "),
        (is_not_finite, 7, "is wrong: "),
        (raises, 7, "cannot be run (no engine)"),
    ],
)
def test_faults_of_an_operator_are_found(monkeypatch, fault, layers, reason):
    torch.manual_seed(0)  # a channel that is never positive would not miss its bias
    original, batch = small(), images()
    monkeypatch.setattr(FusedConvolution, "fast", fault)
    monkeypatch.setattr(FusedConvolution, "forward", FusedConvolution.plain)  # later layers get what is right
    unfit = unfit_layers(original, batch)
    assert len(unfit) == layers
    assert all(text.startswith(reason) for text in unfit.values())
    if fault is not raises:
        monkeypatch.setattr(FusedConvolution, "forward", fault)
        assert find_difference(original, batch).startswith("is wrong: 3 of 3 features")
        assert find_difference(original, batch, list(unfit)) is None


def test_torch_compile_takes_it():
    original, batch = small(), images()
    compiled = torch.compile(fused_encoder(original), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch), fold_batch_norm(original)(batch), atol=2e-6, rtol=0)
