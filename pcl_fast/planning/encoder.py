"""What an encoder has to compute and to move, counted on the meta device: no real tensor is made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pcl_fast.config import ModelConfig
from pcl_fast.nn.encoder import Encoder

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
        ValueError: an unknown architecture.
    """
    with torch.device("meta"):
        encoder, images = Encoder(model), torch.empty(_IMAGES, 3, size, size)
    with torch.no_grad():
        forward = _work(lambda: encoder(images))
    training = _work(lambda: encoder(images).sum().backward())
    return EncoderCount(forward, training, sum(parameter.numel() for parameter in encoder.parameters()))


def _work(function: Callable[[], object]) -> Work:
    with FlopCounterMode(display=False) as flop, _Traffic() as traffic:
        function()
    return Work(flop.get_total_flops() / _IMAGES, traffic.elements / _IMAGES)


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
