"""What an encoder has to compute and to move, counted on the meta device: no real tensor is made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from pcl_fast.config import ModelConfig
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.timm_network import check_image_sizes

_IMAGES = 64  # counted with: the weights' bytes are divided among as many as share them in a step


class Work(NamedTuple):
    """Work on one image: floating point operations (a multiply-add is two) and tensor elements read or written, each
    operation by itself, as without fusion.
    """

    flop: float
    elements: float


class EncoderCount(NamedTuple):
    """forward: one pass. training: forward and backward. parameters: of one encoder."""

    forward: Work
    training: Work
    parameters: int

    @property
    def step(self) -> float:
        """A step's work per supervised step's: query forward and backward, key forward. 4/3, counted."""
        return (self.training.flop + self.forward.flop) / self.training.flop


@functools.cache
def count(model: ModelConfig, size: int) -> EncoderCount:
    """Count an encoder's work on images [3, size, size].

    Raises:
        ValueError: an unknown architecture, or one that does not take images of this size.
        MissingPackageError: the architecture is timm's, which is not installed.
    """
    check_image_sizes(model.arch, [size])
    with torch.device("meta"):
        encoder, images = Encoder(model), torch.empty(_IMAGES, 3, size, size)
    with torch.no_grad():
        forward = _work(lambda: encoder(images))
    training = _work(lambda: encoder(images).sum().backward())
    return EncoderCount(forward, training, sum(parameter.numel() for parameter in encoder.parameters()))


def _work(function: Callable[[], object]) -> Work:
    own = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=own) as flop, _Traffic() as traffic:
        function()
    return Work(flop.get_total_flops() / _IMAGES, traffic.elements / _IMAGES)


def _convolution_backward(grad, x, weight, *rest, out_shape) -> int:
    """Floating point operations, of shapes: those of the forward pass for each gradient. (PyTorch's own formula counts
    the weights' gradient as if there were no groups: a depthwise convolution as a dense one.)
    """
    transposed, mask = rest[4], rest[-1]
    return sum(mask[:2]) * conv_flop_count(x, weight, grad, transposed=transposed)


class _Traffic(TorchDispatchMode):
    """Adds up the elements of the operations' inputs and outputs. Views move nothing."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            leaves = tree_leaves((args, result))
            self.elements += sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result
