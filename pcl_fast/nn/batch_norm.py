"""Batch norm: over parts of a batch, folded into convolutions, and with statistics averaged over ranks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm that divides the batch into `splits` equal consecutive parts and normalises each with its own
    statistics, as `splits` ranks would. The running statistics become the mean of those of the parts.

    Its state is that of nn.BatchNorm2d, and in eval mode it does the same.
    """

    splits: int = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [N, C, H, W].

        Raises:
            ValueError: in training mode, if the batch does not divide into `splits` equal parts.
        """
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(f"a batch of {len(x)} does not divide into {self.splits} parts")
        means = self.running_mean.repeat(self.splits, 1)
        variances = self.running_var.repeat(self.splits, 1)
        parts = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            for part, mean, variance in zip(x.chunk(self.splits), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(parts)


class SplitBatchNormAct(SplitBatchNorm):
    """The same for timm's batch norm that its activation is a part of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def with_activation(norm: nn.Module) -> bool:
    """Whether this is timm's BatchNormAct2d: y = act(drop(batch norm(x))). It is told by its parts, because timm may
    not be installed.
    """
    return isinstance(norm, nn.BatchNorm2d) and hasattr(norm, "act") and hasattr(norm, "drop")


def can_be_split(norm: nn.Module) -> bool:
    """Whether `split_batch_norm` knows this kind of batch norm."""
    return type(norm) is nn.BatchNorm2d or with_activation(norm)


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Turn every nn.BatchNorm2d in the module, and timm's BatchNormAct2d, into a SplitBatchNorm, in place; parameters
    and buffers stay the same.
    """
    for part in module.modules():
        if can_be_split(part):
            part.__class__ = SplitBatchNormAct if with_activation(part) else SplitBatchNorm
            part.splits = splits


def fold_batch_norm(encoder: nn.Module) -> nn.Module:
    """Return a copy of an encoder in eval mode whose convolutions do the work of the batch norms that follow them.

    With running statistics batch norm is y = a x + b in each channel, which a convolution's weights and bias can
    absorb. The features are the same up to rounding, and one pass over every activation is saved. Batch norm that does
    not follow a convolution, or that may not, stays as it is.
    """
    encoder = copy.deepcopy(encoder).eval()
    for module in encoder.modules():
        if not _in_order(module):
            continue
        children = list(module.named_children())
        for (name, conv), (after, norm) in itertools.pairwise(children):
            # In a ResNet the module registered after a convolution is the one that takes its output.
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and not with_activation(norm):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, after, nn.Identity())
    return encoder.to(memory_format=torch.channels_last)


def _in_order(module: nn.Module) -> bool:
    """Whether a convolution's output goes to the module that is registered after it, and nowhere else. In timm there
    are networks where it does not: of its own classes only the ResNets' are known.
    """
    origin = type(module).__module__
    return origin == "timm.models.resnet" or not origin.startswith("timm.")


def has_batch_norm(module: nn.Module) -> bool:
    """Whether there is any batch norm in a module."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def batch_norm_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, buffer) of all batch-norm statistics in a module."""
    for prefix, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            yield from part.named_buffers(prefix, recurse=False)


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """At the end of this context batch norm's running statistics are what they were at its beginning, in place."""
    buffers = [buffer for _, buffer in batch_norm_buffers(module)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


@torch.no_grad()
def average_statistics(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Replace the batch-norm statistics of every rank, which has seen its own batches, by the mean over all ranks, in
    one all-reduce.
    """
    buffers = [buffer for _, buffer in batch_norm_buffers(module) if buffer.is_floating_point()]
    if group is None or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
