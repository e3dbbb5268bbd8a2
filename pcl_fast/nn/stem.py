"""The first convolution of a ResNet by the kernels of kernels/stem.py, wherever they take it."""

from __future__ import annotations

import torch
from torch import nn

from pcl_fast.kernels import switches
from pcl_fast.nn.hooks import is_hooked

try:
    from pcl_fast.kernels import stem as kernels
    from pcl_fast.kernels.launch import takes_activations
except ImportError:  # Triton is not installed
    kernels = None

_GEOMETRY = {
    "in_channels": 3,
    "kernel_size": (7, 7),
    "stride": (2, 2),
    "padding": (3, 3),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}


class StemConvolution(nn.Conv2d):
    """A convolution that computes by the kernels; what they do not take it leaves to PyTorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return convolve(self, x)


def convolve(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return module(x), by the kernels if the module is a ResNet's first convolution and x are images in half precision
    and channels_last on a GPU, whose gradient nobody asks for. The values are the same up to rounding.
    """
    if suits(module) and _suits_images(module, x):
        return kernels.stem(x, module.weight, module.bias)
    return nn.Conv2d.forward(module, x) if type(module) is StemConvolution else module(x)


def suits(module: nn.Module) -> bool:
    """Return whether a module is a convolution that the kernels may take the place of."""
    if kernels is None or type(module) not in (nn.Conv2d, StemConvolution):
        return False
    return not is_hooked(module) and all(getattr(module, name) == value for name, value in _GEOMETRY.items())


def _suits_images(module: nn.Module, x: torch.Tensor) -> bool:
    if not x.is_cuda or x.ndim != 4 or switches.is_off("stem") or not takes_stem(x.dtype, x.device):
        return False
    if not x.is_contiguous(memory_format=torch.channels_last) or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return module.weight.dtype == x.dtype or torch.is_autocast_enabled("cuda")


def takes_stem(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether there are kernels for images of this type that are faster than the library: in float32 it needs no
    padding.
    """
    return kernels is not None and dtype != torch.float32 and takes_activations(dtype, device)
