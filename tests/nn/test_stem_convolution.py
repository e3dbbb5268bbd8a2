"""Which convolutions the stem's kernels take, and that nothing else changes. Here `is_cuda` is all that a GPU is."""

from __future__ import annotations

import pytest
import torch
from pcl_fast.kernels import switches
from torch import nn
from torchvision.models import resnet18

from pcl_fast.nn import stem
from pcl_fast.nn.fused_batch_norm import fuse_batch_norm, unfuse_batch_norm
from pcl_fast.nn.stem import StemConvolution, convolve


@pytest.fixture
def taken(monkeypatch) -> list:
    """The shapes of what the kernels are asked for."""
    found = []

    def by_kernels(x, weight, bias):
        found.append(tuple(x.shape))
        return nn.functional.conv2d(x, weight.to(x.dtype), bias, stride=2, padding=3)

    monkeypatch.setattr(stem.kernels, "stem", by_kernels)
    monkeypatch.setattr(stem, "takes_activations", lambda dtype, device: dtype in (torch.float32, torch.bfloat16))
    return found


class OnGpu(torch.Tensor):
    is_cuda = True


def images(dtype=torch.bfloat16, memory_format=torch.channels_last, gpu: bool = True) -> torch.Tensor:
    x = torch.randn(2, 3, 9, 12).to(dtype).contiguous(memory_format=memory_format)
    return x.as_subclass(OnGpu) if gpu else x


def convolution(**options) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 3, "out_channels": 8, "kernel_size": 7, "stride": 2, "padding": 3} | options)


@pytest.mark.parametrize("kind", [nn.Conv2d, StemConvolution])
@pytest.mark.parametrize(
    ("options", "takes"),
    [
        ({}, True),
        ({"bias": False}, True),
        ({"kernel_size": 5}, False),
        ({"stride": 1}, False),
        ({"padding": 2}, False),
        ({"dilation": 2}, False),
        ({"padding_mode": "reflect"}, False),
    ],
    ids=str,
)
def test_what_is_taken(taken, kind, options, takes):
    module, x = convolution(**options).bfloat16(), images()
    expected = module(x)
    module.__class__ = kind
    assert torch.equal(convolve(module, x), expected)
    assert taken == [(2, 3, 9, 12)] * takes


@pytest.mark.parametrize(
    "x",
    [
        images(gpu=False),
        images(torch.float32),
        images(memory_format=torch.contiguous_format),
        images().requires_grad_(),
    ],
    ids=["host", "float32", "channels first", "with a gradient"],
)
def test_what_is_left_to_pytorch(taken, x):
    module = convolution().to(x.dtype)
    assert torch.equal(convolve(module, x), module(x))
    assert taken == []


def test_weights_of_another_type_are_taken_under_autocast_alone(taken, monkeypatch):
    module, x = convolution(bias=False), images()
    with pytest.raises(RuntimeError, match="type"):
        convolve(module, x)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    convolve(module, x)
    assert taken == [(2, 3, 9, 12)]


def test_hooks_are_called(taken):
    module, x, called = convolution().bfloat16(), images(), []
    module.register_forward_hook(lambda *given: called.append(1))
    convolve(module, x)
    assert (taken, called) == ([], [1])


def test_switched_off(taken):
    with switches.without("stem"):
        convolve(convolution().bfloat16(), images())
    assert taken == []


def test_a_fused_resnet_takes_it(taken):
    encoder = resnet18().bfloat16().to(memory_format=torch.channels_last).eval()
    x = images()
    expected = encoder(x)
    fuse_batch_norm(encoder)
    with switches.without("batch_norm"), switches.without("max_pool"):
        assert torch.equal(encoder(x), expected)
    assert taken == [(2, 3, 9, 12)]
    unfuse_batch_norm(encoder)
    encoder(x)
    assert len(taken) == 1
