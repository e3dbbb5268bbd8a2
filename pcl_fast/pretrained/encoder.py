"""An encoder that was trained before, by this project or another, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pcl_fast.clustering.types import PrototypeSet
from pcl_fast.config import DataConfig
from pcl_fast.nn.timm_network import check_image_sizes

THE_ONLY_ONE = "the only one"


@dataclass(frozen=True)
class Pretrained:
    """A pre-trained encoder in eval mode.

    backbone: maps images [N, 3, H, W] to pooled features [N, width].
    head: maps these to [N, dim], not yet normalised; None where the file has none.
    width: number of the backbone's features.
    arch: torchvision's name of the ResNet, or cifar_resnet8, ..., or timm/NAME; small_stem as in ModelConfig.
    encoder: "query" or "momentum"; THE_ONLY_ONE of a file that has one.
    source: what the file is, in words.
    path: of the file that was read; checksum: its SHA-256.
    data: how the images were read that it learned from, if the file says.
    notes: sentences that say what was loaded and what was left out.
    facts: what else the file says ("epoch", ...), of plain values.
    prototypes: what the last E-step of a run found, on the CPU, one set for every number of clusters; empty where there
        was none.
    """

    backbone: nn.Module
    head: nn.Module | None
    width: int
    arch: str
    small_stem: bool
    encoder: str
    source: str
    path: Path
    checksum: str
    data: DataConfig | None
    notes: tuple[str, ...]
    facts: dict[str, Any]
    prototypes: tuple[PrototypeSet, ...] = ()

    def reading(self, size: int | None = None, **options: Any) -> DataConfig:
        """Return how images are read and cropped for this encoder: as those that it learned from, if the file says.

        Args:
            size: side of the centre crops, in pixels, if not what it learned from; of 256/224 of that an image's
                shorter side then is.
            options: the other fields of DataConfig that are the caller's: root, format, loader, workers, cache.

        Raises:
            ValueError: the encoder does not take images of this size.
        """
        data = replace(self.data or DataConfig(), skip_broken=False, **options)
        if size not in (None, data.size):
            data = replace(data, size=size, resize=None)
        check_image_sizes(self.arch, [data.size])
        return data

    def to(self, device: torch.device) -> Pretrained:
        """Move the networks to a device, in channels_last, and return this object."""
        for network in (self.backbone, self.head):
            if network is not None:
                network.to(device, memory_format=torch.channels_last)
        return self
