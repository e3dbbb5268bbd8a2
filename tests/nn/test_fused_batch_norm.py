"""Rewritten ResNets against the modules that they were: outputs, gradients, state, what is left to the modules.

The operation is the kernels' plain twin, or the kernels on a GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pcl_fast.kernels import batch_norm_plain
from ranks import run_ranks
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from pcl_fast.config import ModelConfig
from pcl_fast.nn import fused_batch_norm as module
from pcl_fast.nn.batch_norm import fold_batch_norm, split_batch_norm
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.fused_batch_norm import fuse_batch_norm, unfuse_batch_norm
from pcl_fast.nn.momentum import momentum_copy
from pcl_fast.nn.sync_batch_norm import sync_batch_norm


class Counted:
    """The plain operation, and what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, *parameters, **options):
        self.calls.append(options)
        return batch_norm_plain.batch_norm_act(x, *parameters, **options)

    def count(self, **options) -> int:
        return sum(all(bool(call[name]) is value for name, value in options.items()) for call in self.calls)


@pytest.fixture
def operation(monkeypatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(module, "_kernels", lambda x: counted)
    return counted


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def small_resnet() -> ResNet:
    """torchvision's, with two blocks in each of two layers only, and few channels."""
    network = ResNet(BasicBlock, [2, 2, 1, 1], num_classes=5)
    return _narrow(network)


def _narrow(network: ResNet) -> ResNet:
    """A quarter of the channels: the same code in a fraction of the time."""
    for part in network.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.Conv2d):
                inputs = 3 if child.in_channels == 3 else child.in_channels // 8
                sizes = child.kernel_size, child.stride, child.padding
                setattr(part, name, nn.Conv2d(inputs, child.out_channels // 8, *sizes, bias=False))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(part, name, nn.BatchNorm2d(child.num_features // 8))
    network.fc = nn.Linear(network.fc.in_features // 8, 5)
    return network


def networks() -> dict[str, nn.Module]:
    head = {"dim": 8, "head": "linear"}
    return {
        "torchvision": small_resnet(),
        "bottleneck": _narrow(ResNet(module.Bottleneck, [2, 1, 1, 1])),
        "cifar": Encoder(ModelConfig(arch="cifar_resnet14", **head)),
    }


# Batch norms; those with a residual; those of the last whose output goes to another block.
COUNTS = {"torchvision": (16, 6, 5), "bottleneck": (20, 5, 4), "cifar": (15, 6, 5)}


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32).double().to(memory_format=torch.channels_last)


def randomised(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    tensor.uniform_(0.5, 1.5)
    return network.double().to(memory_format=torch.channels_last)


def step(network: nn.Module, x: torch.Tensor, upstream: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Output, gradients of the images and of all parameters, and buffers after a training step."""
    x = x.clone().requires_grad_()
    y = network(x)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) if upstream is None else upstream
    gradients = torch.autograd.grad(y, [x, *network.parameters()], upstream)
    return [y.detach(), *gradients, *network.buffers()]


def assert_alike(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", COUNTS)
def test_it_computes_what_the_modules_do(name, operation):
    network = randomised(networks()[name])
    fused = copy.deepcopy(network)
    norms, residuals, forks = COUNTS[name]
    assert fuse_batch_norm(fused) == norms
    assert list(fused.state_dict()) == list(network.state_dict())
    x = images()
    assert_alike(step(fused, x), step(network, x))
    assert len(operation.calls) == norms
    assert operation.count(relu=False) == norms - operation.count(relu=True)
    downsamples = sum(isinstance(part, nn.Sequential) and len(part) == 2 and isinstance(part[0], nn.Conv2d)
                      for part in network.modules())  # fmt: skip
    assert operation.count(relu=False) == downsamples
    found = [call["residual"] is not None for call in operation.calls]
    assert sum(found) == residuals
    assert operation.count(fork=True) == forks
    # Evaluation has the running statistics, and no gradient.
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), network.eval()(x))
    unfuse_batch_norm(fused)
    assert [type(part) for part in fused.modules()] == [type(part) for part in network.modules()]
    assert_alike(step(fused.train(), x), step(network.train(), x))
    assert len(operation.calls) == 2 * norms
