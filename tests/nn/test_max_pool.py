"""Which poolings the kernels take, and that nothing else changes. Here `is_cuda` is all that a GPU is."""

from __future__ import annotations

import pytest
import torch
from pcl_fast.kernels import switches
from torch import nn

from pcl_fast.nn import max_pool
from pcl_fast.nn.max_pool import FusedMaxPool2d, pool


@pytest.fixture
def taken(monkeypatch) -> list:
    """The windows of what the kernels are asked for."""
    found = []

    def by_kernels(x, *window):
        found.append(window)
        return nn.functional.max_pool2d(x, *window)

    monkeypatch.setattr(max_pool.kernels, "max_pool", by_kernels)
    monkeypatch.setattr(max_pool, "takes_pooling", lambda dtype, device: dtype != torch.float64)
    return found


class OnGpu(torch.Tensor):
    is_cuda = True


def images(dtype=torch.float32, memory_format=torch.channels_last, gpu: bool = True) -> torch.Tensor:
    x = torch.randn(2, 8, 9, 11).to(dtype).contiguous(memory_format=memory_format)
    return x.as_subclass(OnGpu) if gpu else x


@pytest.mark.parametrize("kind", [nn.MaxPool2d, FusedMaxPool2d])
@pytest.mark.parametrize(
    ("options", "window"),
    [
        ((3, 2, 1), (3, 2, 1)),
        ((2,), (2, 2, 0)),
        (((3, 3),), None),
        ((3, 2, 1, 2), None),  # dilation
        ((3, 2, 1, 1, False, True), None),  # ceil_mode
    ],
)
def test_what_is_taken(taken, kind, options, window):
    module, x = kind(*options), images()
    found = pool(module, x) if kind is nn.MaxPool2d else module(x)
    expected = nn.MaxPool2d(*options)(x)
    assert torch.equal(found, expected)
    assert taken == ([] if window is None else [window])


@pytest.mark.parametrize(
    "x",
    [images(gpu=False), images(torch.float64), images(memory_format=torch.contiguous_format), images()[0]],
    ids=["host", "float64", "channels first", "3 dimensions"],
)
def test_what_is_left_to_pytorch(taken, x):
    for module in (nn.MaxPool2d(3, 2, 1), FusedMaxPool2d(3, 2, 1)):
        assert torch.equal(pool(module, x), nn.MaxPool2d(3, 2, 1)(x))
    assert taken == []


def test_a_kernel_that_is_off_hooks_and_others_modules(taken):
    hooked = nn.MaxPool2d(3, 2, 1)
    hooked.register_forward_hook(lambda module, given, found: found + 1)
    x = images()
    assert torch.equal(pool(hooked, x), nn.MaxPool2d(3, 2, 1)(x) + 1)
    assert torch.equal(pool(nn.Identity(), x), x)
    with switches.without("max_pool"):
        pool(nn.MaxPool2d(3, 2, 1), x)
    assert taken == []
