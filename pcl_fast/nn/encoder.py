"""The encoder: a backbone, which is a ResNet or one of timm's networks, with a projection head."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from pcl_fast.config import ModelConfig
from pcl_fast.nn.batch_norm import can_be_split, split_batch_norm
from pcl_fast.nn.timm_network import build_timm, timm_name


class Encoder(nn.Module):
    """A backbone with a projection head, which maps images [N, 3, H, W] to unit features [N, dim] float32.

    width: of the backbone's pooled features, before the head.
    """

    def __init__(self, config: ModelConfig):
        """
        Raises:
            ValueError: no such architecture, or --model.bn-splits of one that has no batch norm, or none that is known.
            MissingPackageError: the architecture is timm's, which is not installed.
        """
        super().__init__()
        self.backbone, width = build_backbone(config)
        self.width = width
        hidden = width if config.hidden is None else config.hidden
        if config.head == "mlp":
            self.head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, config.dim))
        elif config.head == "mlp_bn":
            # No biases before batch norm, which would take them away.
            layers = nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()
            self.head = nn.Sequential(*layers, nn.Linear(hidden, config.dim, bias=False), nn.BatchNorm1d(config.dim))
        elif config.head == "mlp_inner_bn":
            self.head = mlp_inner_bn(width, hidden, config.dim)
        elif config.head == "mlp_unbiased_bn":
            self.head = mlp_inner_bn(width, hidden, config.dim, bias=False)
        else:
            self.head = nn.Linear(width, config.dim)
        if config.bn_splits > 1:
            _check_splits(self.backbone, config)
            split_batch_norm(self, config.bn_splits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.both(images)[1]

    def both(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The backbone's pooled features [N, width], as they are, and the unit features of `forward`, in one pass.

        What torch.compile has made of `forward` is not used here.
        """
        pooled = self.backbone(images)
        # In float32 even under autocast: half precision would leave |q| off by 1e-3, times 1/tau in every logit.
        return pooled, F.normalize(self.head(pooled).float(), dim=1)

    def projected(self, images: torch.Tensor) -> torch.Tensor:
        """What the head makes of the images, [N, dim] in the precision of its products, not yet unit features.

        What torch.compile has made of `forward` is not used here.
        """
        return self.head(self.backbone(images))


def mlp_inner_bn(width: int, hidden: int, dim: int, *, bias: bool = True) -> nn.Sequential:
    """Return two linear layers, [N, width] -> [N, hidden] -> [N, dim], with batch norm and a ReLU between them.

    bias: of the second layer; the first has none, which batch norm would take away.
    """
    layers = nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(hidden, dim, bias=bias))


class Pooled(nn.Module):
    """A backbone that maps images [N, 3, H, W] to its pooled features as unit features [N, width] float32. Its layers
    have the names that they have in the encoder.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.backbone(images).float(), dim=1)


def resnet_names() -> list[str]:
    """Return torchvision's names of its ResNets."""
    return [name for name in torchvision.models.list_models(torchvision.models) if "resne" in name]


def build_backbone(config: ModelConfig) -> tuple[nn.Module, int]:
    """Return (backbone, whose output is its pooled features; how many features these are).

    Raises:
        ValueError: no such architecture; names those that there are.
        MissingPackageError: it is timm's, which is not installed.
    """
    if (name := timm_name(config.arch)) is not None:
        if config.small_stem:
            raise ValueError(
                f"--model.small-stem is for torchvision's ResNets; --model.arch {config.arch} has its own stem: use "
                "--model.no-small-stem"
            )
        return build_timm(name)
    if depth := re.fullmatch(r"cifar_resnet(\d+)", config.arch):
        return _cifar_resnet(int(depth[1]))
    names = resnet_names()
    if config.arch not in names:
        raise ValueError(
            f"--model.arch {config.arch} is no ResNet; choose from {', '.join(names)}, or cifar_resnet8, 14, 20, ..., "
            "or one of timm's networks as timm/NAME"
        )
    backbone = torchvision.models.get_model(config.arch)
    width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if config.small_stem:
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone, width


def building_device(config: ModelConfig) -> str:
    """Return where a backbone is best built that will be filled with other values: on the meta device, unless it may
    have buffers that no state holds, as some of timm's have.
    """
    return "meta" if timm_name(config.arch) is None else "cpu"


def _check_splits(backbone: nn.Module, config: ModelConfig) -> None:
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise ValueError(
            f"--model.bn-splits {config.bn_splits}: --model.arch {config.arch} has no batch norm to split; use "
            "--model.bn-splits 1"
        )
    if unknown := {type(norm).__name__ for norm in norms if not can_be_split(norm)}:
        raise ValueError(
            f"--model.bn-splits {config.bn_splits} does not split the {', '.join(sorted(unknown))} of --model.arch "
            f"{config.arch}; use --model.bn-splits 1"
        )


def _cifar_resnet(depth: int) -> tuple[nn.Module, int]:
    """Return the ResNet of 6n+2 layers for 32 px images (He et al. 2016, section 4.2; widths 16, 32, 64), and its
    number of features.
    """
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
    """Return two 3x3 convolutions with a shortcut; where the width grows, the side is halved and the shortcut is a 1x1
    convolution.
    """
    if width_in == width:
        return BasicBlock(width, width)
    shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(width_in, width, stride=2, downsample=shortcut)
