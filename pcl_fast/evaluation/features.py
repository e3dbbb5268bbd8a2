"""The features of a data set by a frozen encoder, computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pcl_fast.config import DataConfig
from pcl_fast.data import ImageSet, clustering_loader, normalise
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.nn.batch_norm import fold_batch_norm
from pcl_fast.nn.precision import autocast, encoder_dtype
from pcl_fast.pretrained import Pretrained
from pcl_fast.schedule import encoded_at_a_time


class Features(NamedTuple):
    """A rank's shard of a data set's features: float32 on a CPU, float16 on a GPU.

    backbone: [n_local, width], as the backbone gives them.
    head: [n_local, dim], of unit length; None for an encoder without a head.
    """

    backbone: torch.Tensor
    head: torch.Tensor | None

    def unit(self, kind: Literal["head", "backbone"] = "head") -> torch.Tensor:
        """Return the features of this kind at unit length: the backbone's too where there is no head."""
        return F.normalize(self.backbone, dim=1) if kind == "backbone" or self.head is None else self.head


class FrozenBackbone:
    """A function from uint8 [N, H, W, 3] to a backbone's features, float32 [N, width] without a gradient.

    network: the backbone in eval mode, batch norm folded into the convolutions. GPUs compute in half precision, as in
        training.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self.network, self.device, self.dtype = fold_batch_norm(network).to(device), device, encoder_dtype(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(self.device):
            return self.network(normalise(images, self.dtype)).float()


def frozen_backbone(pretrained: Pretrained, device: torch.device) -> FrozenBackbone:
    """Return the function from bytes to the features of a copy of the backbone."""
    return FrozenBackbone(pretrained.backbone, device)


@torch.inference_mode()
def encode_set(
    pretrained: Pretrained,
    images: ImageSet,
    data: DataConfig,
    world: World,
    progress: Callable[[int], None] = lambda done: None,
) -> Features:
    """Encode this rank's shard of the centre crops of a data set, in its order, in one pass.

    Args:
        pretrained: on this rank's device.
        images: the whole data set.
        data: how to read and crop.
        world: the ranks.
        progress: is told how many images of the shard are done.
    """
    begin, end = shard_bounds(len(images), world.rank, world.size)
    device, head = world.device, pretrained.head
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    encode = frozen_backbone(pretrained, device)
    backbone = torch.empty(end - begin, pretrained.width, dtype=dtype, device=device)
    units = None if head is None else torch.empty(end - begin, _dim(head), dtype=dtype, device=device)
    rows = encoded_at_a_time(device)
    done = 0
    for batch in clustering_loader(images, data, batch_size=rows, world=world):
        found = encode(batch)
        backbone[done : done + len(batch)] = found
        if units is not None:
            units[done : done + len(batch)] = F.normalize(head(found), dim=1)
        done += len(batch)
        progress(done)
    return Features(backbone, units)


def _dim(head: nn.Module) -> int:
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1].out_features
