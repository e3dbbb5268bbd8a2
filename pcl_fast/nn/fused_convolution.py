"""Convolution, bias, shortcut and ReLU in one pass, for networks that are only evaluated.

cuDNN and oneDNN can finish a convolution's output while it still lies in registers. cuDNN's operators in PyTorch cannot
be traced: here they are one operator, torch.ops.pcl_fast.convolution_relu, that torch.compile takes as it is, and that
on other devices computes in steps. oneDNN's take weights in their own order of memory, which no traced operator can be
given; a FusedConvolution keeps them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

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

    Its state is that of nn.Conv2d. It has no gradient. On a CPU the weights are kept a second time, as oneDNN wants
    them for the first images that come.

    overwrites: whether the result may take the shortcut's place in memory. Only oneDNN makes use of it.
    """

    overwrites: bool = False
    _packed: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Map x [N, C, H, W] and residual, of the result's shape, to the result [N, D, H', W']. Where the type of the
        weight is not that of x, as under autocast, it computes in steps.
        """
        if x.dtype != self.weight.dtype:
            return self.plain(x, residual)
        if _takes_onednn(x):
            over = residual if self.overwrites or residual is None else residual.clone()
            fast = _tried(lambda: self.fast(x, over), x, self.weight)
            return self.plain(x, residual) if fast is None else fast
        return OPERATOR(x, self.weight, self.bias, residual, *self.geometry)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Return (stride, padding, dilation, groups), as operators take them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def plain(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return the same, computed in steps."""
        return plain_convolution_relu(x, self.weight, self.bias, residual, *self.geometry)

    def fast(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return the same by the library's operator, whatever comes of it. On a CPU residual is overwritten.

        Raises:
            RuntimeError: the library has none for these types and shapes.
        """
        if x.is_cuda:
            return cudnn_convolution_relu(x, self.weight, self.bias, residual, *self.geometry)
        stride, padding, dilation, groups = self.geometry
        settings = padding, stride, dilation, groups
        if self._packed is None:
            weight = self.weight.detach().contiguous().to_mkldnn()
            self._packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *settings, tuple(x.shape))
        operators = torch.ops.mkldnn
        if residual is None:
            return operators._convolution_pointwise(x, self._packed, self.bias, *settings, "relu", [None], "")
        # The one that makes a new tensor copies, and takes longer than the separate steps.
        return operators._convolution_pointwise_(
            residual, x, self._packed, self.bias, *settings, "add", None, "relu", [None], None
        )

    def _apply(self, *arguments, **options):
        self._packed = None  # of weights that are moved, or get another type
        return super()._apply(*arguments, **options)


def _takes_onednn(x: torch.Tensor) -> bool:
    """torch.compile has ways of its own to fuse and to keep weights."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype is not torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


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


def cudnn_convolution_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """Return what `plain_convolution_relu` returns, up to rounding, by cuDNN's operator.

    Raises:
        RuntimeError: there is none for these types and shapes, or the tensors are not on a GPU.
    """
    settings = stride, padding, dilation, groups
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *settings)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *settings)


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
    return torch.backends.mkldnn.is_available()


def is_taken(x: torch.Tensor, residual: torch.Tensor | None, elements: int) -> bool:
    """Return whether the library's operator can be given these tensors; `elements` are those of its result.

    cuDNN's not where the shortcut is the input itself (PyTorch's issue 62926), nor where algorithms have been asked
    for that give the same bits every time, to which its fused convolutions do not listen.
    """
    if not x.is_cuda:
        return _takes_onednn(x)
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


def _on_cpu(*arguments):
    return plain_convolution_relu(*arguments).contiguous(memory_format=torch.channels_last)


def _on_gpu(x, weight, bias, residual, stride, padding, dilation, groups):
    arguments = x, weight, bias, residual, stride, padding, dilation, groups
    result = None
    if is_taken(x, residual, math.prod(_shape(x, weight, stride, padding, dilation))):
        result = _tried(lambda: cudnn_convolution_relu(*arguments), x, weight)
    if result is None:
        result = plain_convolution_relu(*arguments)
    return result.contiguous(memory_format=torch.channels_last)


def _tried(fast: Callable[[], torch.Tensor], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """None where the library has no operator for these tensors: a pass over a data set must not end for that. What has
    run out of memory would not fit in separate steps either.
    """
    try:
        return fast()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shapes = tuple(x.shape), tuple(weight.shape)
        line = str(error).partition("\n")[0]
        warnings.warn(f"no fused convolution of {shapes[0]} with {shapes[1]}, done in steps ({line})", stacklevel=2)
        return None


_library.impl("convolution_relu", _on_cpu, "CPU")
_library.impl("convolution_relu", _on_gpu, "CUDA")
OPERATOR = torch.ops.pcl_fast.convolution_relu
