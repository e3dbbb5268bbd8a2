"""The encoder, its momentum twin and the queue of keys."""

from __future__ import annotations

import copy
import re

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from pcl_fast.batch_norm import split_batch_norm
from pcl_fast.config import ModelConfig


class Encoder(nn.Module):
    """A ResNet and a projection head: images [N, 3, H, W] -> unit features [N, dim] float32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.backbone, width = _build_backbone(config)
        if config.head == "mlp":
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.dim))
        else:
            self.head = nn.Linear(width, config.dim)
        if config.bn_splits > 1:
            split_batch_norm(self, config.bn_splits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # In float32 even under autocast: half precision would leave |q| off by 1e-3, times 1/tau in every logit.
        return F.normalize(self.head(self.backbone(images)).float(), dim=1)


def _build_backbone(config: ModelConfig) -> tuple[nn.Module, int]:
    """(backbone with pooled features as output, their number)."""
    if depth := re.fullmatch(r"cifar_resnet(\d+)", config.arch):
        return _cifar_resnet(int(depth[1]))
    names = [name for name in torchvision.models.list_models(torchvision.models) if "resne" in name]
    if config.arch not in names:
        raise ValueError(
            f"--model.arch {config.arch} is no ResNet; choose from {', '.join(names)}, or cifar_resnet8, 14, 20, ..."
        )
    backbone = torchvision.models.get_model(config.arch)
    width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if config.small_stem:
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone, width


def _cifar_resnet(depth: int) -> tuple[nn.Module, int]:
    """The 6n+2-layer ResNet for 32 px images of He et al. 2016, section 4.2: widths 16, 32, 64."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"--model.arch cifar_resnet{depth}: the depth must be 6n+2 (8, 14, 20, ...)")
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width_in = 16
    for width in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            layers.append(_basic_block(width_in, width))
            width_in = width
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision's ResNets do
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone, width_in


def _basic_block(width_in: int, width: int) -> BasicBlock:
    """Two 3x3 convolutions; where the width grows the side is halved and the shortcut becomes a 1x1 convolution."""
    if width_in == width:
        return BasicBlock(width, width)
    shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(width_in, width, stride=2, downsample=shortcut)


class MomentumTwin:
    """Keeps `key` a moving average of `query`: parameters only, batch-norm statistics are the key encoder's own."""

    def __init__(self, query: nn.Module, momentum: float):
        """momentum: share of itself that the twin keeps per update."""
        self.key = copy.deepcopy(query).requires_grad_(False)
        self.momentum = momentum
        self._pairs = (list(self.key.parameters()), list(query.parameters()))

    @torch.no_grad()
    def update(self) -> None:
        """key = momentum * key + (1 - momentum) * query, all parameters in one call."""
        keys, queries = self._pairs
        torch._foreach_lerp_(keys, queries, 1 - self.momentum)


class KeyQueue(nn.Module):
    """The last `size` momentum keys, [size, dim], in a ring. Starts with random unit vectors.

    Takes any number of keys at a time: it wraps, and of more than `size` keeps the last.
    """

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1).to(dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Replace the oldest keys by `keys` [B, dim]. Without waiting for the device: the position lives there."""
        size = len(self.keys)
        skipped = max(0, len(keys) - size)
        keys = keys[skipped:]
        slots = (self.position + skipped + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.position.add_(skipped + len(keys)).remainder_(size)
