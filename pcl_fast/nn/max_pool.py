"""Max pooling by the kernels of kernels/max_pool.py, wherever they take it."""

from __future__ import annotations

import torch
from torch import nn

from pcl_fast.kernels import switches
from pcl_fast.nn.hooks import is_hooked

try:
    from pcl_fast.kernels import max_pool as kernels
    from pcl_fast.kernels.launch import takes_activations
except ImportError:  # Triton is not installed
    kernels = None


class FusedMaxPool2d(nn.MaxPool2d):
    """A module that pools by the kernels; what they do not take it leaves to PyTorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pool(self, x)


def pool(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return module(x), by the kernels if the module is a max pooling that they take: of squares, without dilation, of
    activations in channels_last on a GPU. The values are the same.
    """
    window = _window(module)
    usable = window is not None and x.is_cuda and x.ndim == 4 and not switches.is_off("max_pool")
    if not usable or not x.is_contiguous(memory_format=torch.channels_last) or not takes_pooling(x.dtype, x.device):
        return nn.MaxPool2d.forward(module, x) if type(module) is FusedMaxPool2d else module(x)
    return kernels.max_pool(x, *window)


def takes_pooling(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether there are kernels for activations of this type."""
    return kernels is not None and takes_activations(dtype, device)


def _window(module: nn.Module) -> tuple[int, int, int] | None:
    """Return kernel, stride and padding of a module that the kernels may take the place of, or None."""
    if type(module) not in (nn.MaxPool2d, FusedMaxPool2d) or is_hooked(module):
        return None
    stride = module.kernel_size if module.stride is None else module.stride
    numbers = module.kernel_size, stride, module.padding
    plain = module.dilation == 1 and not module.ceil_mode and not module.return_indices
    return numbers if plain and kernels is not None and all(isinstance(number, int) for number in numbers) else None
