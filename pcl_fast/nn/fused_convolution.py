"""Convolution, bias, shortcut and ReLU as one operator, for networks that are only evaluated.

cuDNN and oneDNN can finish a convolution's output while it still lies in registers. PyTorch offers this as operators
that torch.compile does not look into and that have no gradient, and cuDNN's cannot be traced at all. Here they are one
operator, torch.ops.pcl_fast.convolution_relu, that can be traced, exported and captured in a CUDA graph.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn

# The sides of kernels for which cuDNN's fused convolution is used. With a side of 7 it was 17 times slower than apart
# (PyTorch's issue 68506).
_SIDES = (1, 3)
# Tensor cores take so many channels of half precision at once.
_CHANNELS = 8
# cuDNN's fused convolution counts elements with 32 bits.
_MOST_ELEMENTS = 2**31 - 1


class FusedConvolution(nn.Conv2d):
    """A convolution that also adds a shortcut, if it is given one, and takes what is positive:

        y = relu(weight * x + bias + residual)

    Its state is that of nn.Conv2d. It has no gradient. Where the type of its weight is not that of x, as under
    autocast, and where the operator is of no use, it computes in separate steps.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Map x [N, C, H, W] and residual, of the result's shape, to the result [N, D, H', W']."""
        tensors = x, self.weight, self.bias, residual
        if x.dtype != self.weight.dtype:
            return plain_convolution_relu(*tensors, *self.geometry)
        return torch.ops.pcl_fast.convolution_relu(*tensors, *self.geometry)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Return (stride, padding, dilation, groups), as operators take them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


def plain_convolution_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """Return relu(weight * x + bias + residual) in separate steps.

    Args:
        x: [N, C, H, W]; weight: [D, C / groups, h, w]; bias: [D] or None; all of one floating-point type.
        residual: [N, D, H', W'] or None.
        stride, padding, dilation, groups: as F.conv2d takes them.
    """
    result = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return result.relu_() if residual is None else result.add_(residual).relu_()


def fast_convolution_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """Return what `plain_convolution_relu` returns, up to rounding, by the one operator of cuDNN or oneDNN.

    Raises:
        RuntimeError: the library has no such operator for these types and shapes.
    """
    if x.is_cuda:
        settings = stride, padding, dilation, groups
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *settings)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *settings)
    tensors, settings = (x, weight, bias), (padding, stride, dilation, groups)
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise(*tensors, *settings, "relu", [None], "")
    # Of "add" oneDNN may write into the shortcut; this operator makes a new tensor.
    tensors = x, residual, weight, bias
    return torch.ops.mkldnn._convolution_pointwise(*tensors, *settings, "add", None, "relu", [None], None)


def suits(conv: nn.Conv2d) -> bool:
    """Return whether the operator is of use for a layer of this shape, on the device where the layer lies.

    On a GPU that is a kernel of side 1 or 3 in one group, with channels that tensor cores take: every layer of a ResNet
    but its stem. On a CPU it is every layer.
    """
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if conv.weight.is_cuda:
        sides, channels = conv.kernel_size, (conv.in_channels, conv.out_channels)
        aligned = not any(count % _CHANNELS for count in channels)
        return set(sides) <= set(_SIDES) and conv.groups == 1 and set(conv.dilation) == {1} and aligned
    return _has_onednn()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._has_mkldnn


def is_taken(x: torch.Tensor, residual: torch.Tensor | None, elements: int) -> bool:
    """Return whether the operator can be given these tensors; `elements` are those of its result.

    Not by cuDNN where the shortcut is the input itself (PyTorch's issue 62926), nor where algorithms have been asked
    for that give the same bits every time, to which its fused convolutions do not listen.
    """
    if not x.is_cuda:
        return x.dtype is torch.float32 and _has_onednn() and torch.backends.mkldnn.enabled
    if torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic:
        return False
    if residual is not None and residual.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return False
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return channels_last and torch.backends.cudnn.enabled and max(x.numel(), elements) <= _MOST_ELEMENTS


# --- the operator -------------------------------------------------------------------------------------------------
# By Library and not by custom_op, whose checks cost more than the launch of a kernel.

_library = torch.library.Library("pcl_fast", "FRAGMENT")
_library.define(
    "convolution_relu(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _shape(x, weight, stride, padding, dilation) -> tuple[int, ...]:
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    lengths = [(side + 2 * pad - far * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, far in sides]
    return len(x), len(weight), *lengths


@torch.library.register_fake("pcl_fast::convolution_relu")
def _fake(x, weight, bias, residual, stride, padding, dilation, groups):
    result = x.new_empty(_shape(x, weight, stride, padding, dilation))
    return result.contiguous(memory_format=torch.channels_last)


def _convolution_relu(x, weight, bias, residual, stride, padding, dilation, groups):
    arguments = x, weight, bias, residual, stride, padding, dilation, groups
    result = None
    if is_taken(x, residual, math.prod(_shape(x, weight, stride, padding, dilation))):
        result = _tried(*arguments)
    if result is None:
        result = plain_convolution_relu(*arguments)
    return result.contiguous(memory_format=torch.channels_last)


def _tried(*arguments) -> torch.Tensor | None:
    """None where the library has no operator for these tensors: a pass over a data set must not end for that. What has
    run out of memory would not fit in separate steps either.
    """
    try:
        return fast_convolution_relu(*arguments)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shapes = [tuple(tensor.shape) for tensor in arguments[:2]]
        line = str(error).partition("\n")[0]
        warnings.warn(f"no fused convolution of {shapes[0]} with {shapes[1]}, done in steps ({line})", stacklevel=2)
        return None


for _device in ("CPU", "CUDA"):
    _library.impl("convolution_relu", _convolution_relu, _device)
