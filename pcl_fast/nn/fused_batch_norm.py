"""ResNets whose batch norms, and the additions and ReLUs after them, are one operation (kernels/batch_norm.py). Their
first convolution and their max pooling are kernels too (stem.py, max_pool.py).

Only forward passes are replaced: modules, their names and their state stay, so that copies, checkpoints, folded and
synchronised batch norm go on as before. What a forward pass finds that the kernels do not take (a tensor that is not on
a GPU or not in channels_last, another kind of norm or activation, a hook that would not be called) it leaves to the
modules themselves, which then compute the very bits that they would without all this.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pcl_fast.distributed import all_gather_rows, all_reduce_sum
from pcl_fast.kernels import switches
from pcl_fast.nn.batch_norm import SplitBatchNorm
from pcl_fast.nn.hooks import is_hooked
from pcl_fast.nn.max_pool import pool
from pcl_fast.nn.stem import convolve
from pcl_fast.nn.sync_batch_norm import SyncBatchNorm2d

try:
    from pcl_fast.kernels import batch_norm as fused_kernels
    from pcl_fast.kernels.launch import takes_activations
except ImportError:  # Triton is not installed
    fused_kernels = None

_NORMS = nn.BatchNorm2d, SplitBatchNorm, SyncBatchNorm2d
# One tensor, or the same one twice: for a block's first convolution and for its shortcut.
Activations = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def fuse_batch_norm(encoder: nn.Module) -> int:
    """Rewrite the ResNets in a module, in place: torchvision's, their blocks, and every nn.Sequential with batch norms.

    While it trains, a block may hand its output on as a pair, to the block after it and nobody else: who wants the maps
    between the blocks takes them in eval mode, or calls `unfuse_batch_norm` first.

    Returns:
        How many batch norms are in what was rewritten; 0 if there is no pattern that is known, and nothing was done.
    """
    for module in encoder.modules():
        if type(module) in _FUSED and "forward" not in vars(module) and _has_norm(module):
            module.__class__ = _FUSED[type(module)]
    norms = set()
    for module in encoder.modules():
        if type(module) is _FusedResNet:
            _link([block for layer in (module.layer1, module.layer2, module.layer3, module.layer4) for block in layer])
        elif type(module) in (nn.Sequential, _FusedSequential):
            _link(list(module))
        if type(module) in _PLAIN:
            norms |= {norm for norm in module.children() if type(norm) in _NORMS}
    return len(norms)


def unfuse_batch_norm(encoder: nn.Module) -> None:
    """Take back what `fuse_batch_norm` did."""
    for module in encoder.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
            vars(module).pop("forks", None)


def _has_norm(module: nn.Module) -> bool:
    return any(type(child) in _NORMS for child in module.children())


def _link(chain: list[nn.Module]) -> None:
    """Let each block whose output goes to another block alone hand it on as a pair."""
    for block, after in itertools.pairwise(chain):
        if isinstance(block, _FusedBlock) and isinstance(after, _FusedBlock):
            block.forks = True


def norm_act(
    norm: nn.Module, x: torch.Tensor, act: nn.Module | None, *, residual: torch.Tensor | None = None, fork: bool = False
) -> Activations:
    """Return act(norm(x) + residual), in one operation if the kernels take it; with `fork`, then as a pair.

    Args:
        norm: a batch norm, of parts of the batch or of all ranks too, or any other module.
        x: [N, C, H, W].
        act: nn.ReLU, another module, or None.
        residual: like x, or None.
    """
    operation = _operation(norm, x, act, residual)
    if operation is None:
        y = norm(x)
        if residual is not None:
            y += residual
        return y if act is None else act(y)
    training = norm.training
    group = getattr(norm, "group", None)
    return operation(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, residual=residual, relu=act is not None,
        training=training, momentum=norm.momentum, eps=norm.eps, splits=getattr(norm, "splits", 1) if training else 1,
        exchange=_Ranks(group) if group is not None and training else None, fork=fork, batches=norm.num_batches_tracked,
    )  # fmt: skip


def _operation(norm: nn.Module, x: torch.Tensor, act: nn.Module | None, residual) -> Callable[..., Any] | None:
    """Return batch_norm_act, or None if the modules have to do it."""
    known = type(norm) in _NORMS and (act is None or type(act) is nn.ReLU)
    if not known or is_hooked(norm) or (act is not None and is_hooked(act)):
        return None
    if not (norm.affine and norm.track_running_stats and norm.momentum is not None):
        return None
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        return None
    return _kernels(x)


def takes_batch_norm(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether there are kernels for activations of this type."""
    return fused_kernels is not None and takes_activations(dtype, device)


def _kernels(x: torch.Tensor) -> Callable[..., Any] | None:
    """Return batch_norm_act for activations of this kind, or None where there is none that is right."""
    usable = x.is_cuda and not switches.is_off("batch_norm") and takes_batch_norm(x.dtype, x.device)
    return fused_kernels.batch_norm_act if usable else None


class _Ranks:
    """What batch norm of all ranks' values exchanges in a group."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def gather(self, line: torch.Tensor) -> torch.Tensor:
        return all_gather_rows(line, self.group)

    def add_up(self, sums: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(sums, self.group)


# --- the patterns -----------------------------------------------------------------------------------------------------


class _FusedBlock(nn.Module):
    """A block of a ResNet. forks: whether its output goes to another block, and nowhere else."""

    forks: bool = False

    def _end(self, norm: nn.Module, out: torch.Tensor, shortcut: torch.Tensor) -> Activations:
        shortcut = shortcut if self.downsample is None else self.downsample(shortcut)
        forks = self.forks and self.training and torch.is_grad_enabled()
        return norm_act(norm, out, self.relu, residual=shortcut, fork=forks)


class _FusedBasicBlock(_FusedBlock, BasicBlock):
    def forward(self, x: Activations) -> Activations:
        x, shortcut = x if isinstance(x, tuple) else (x, x)
        out = norm_act(self.bn1, self.conv1(x), self.relu)
        return self._end(self.bn2, self.conv2(out), shortcut)


class _FusedBottleneck(_FusedBlock, Bottleneck):
    def forward(self, x: Activations) -> Activations:
        x, shortcut = x if isinstance(x, tuple) else (x, x)
        out = norm_act(self.bn1, self.conv1(x), self.relu)
        out = norm_act(self.bn2, self.conv2(out), self.relu)
        return self._end(self.bn3, self.conv3(out), shortcut)


class _FusedResNet(ResNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pool(self.maxpool, norm_act(self.bn1, convolve(self.conv1, x), self.relu))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class _FusedSequential(nn.Sequential):
    """Batch norms, with the ReLUs that follow them if there are any, among other modules."""

    def forward(self, x: Any) -> Any:
        children = [*self, None]
        for child, before, after in zip(children, [None, *children], children[1:], strict=False):
            if isinstance(child, nn.BatchNorm2d):
                x = norm_act(child, x, after if type(after) is nn.ReLU else None)
            elif not (type(child) is nn.ReLU and isinstance(before, nn.BatchNorm2d)):  # done, or by norm_act
                x = child(x)
        return x


_FUSED: dict[type, type] = {
    BasicBlock: _FusedBasicBlock,
    Bottleneck: _FusedBottleneck,
    ResNet: _FusedResNet,
    nn.Sequential: _FusedSequential,
}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}
