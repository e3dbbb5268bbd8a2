"""Features of the FAIR benchmark's SVMs: the last feature map of a whole image, pooled to 2 x 2."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transform

from pcl_fast.config import DataConfig
from pcl_fast.data import ImageSet, normalise
from pcl_fast.data.loaders.resources import pick_resources
from pcl_fast.data.loaders.torchvision_loader import without_stacks
from pcl_fast.data.views.pil import cut_ends, to_bytes
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.errors import UserError
from pcl_fast.nn.batch_norm import fold_batch_norm
from pcl_fast.nn.precision import autocast, encoder_dtype
from pcl_fast.pretrained import Pretrained
from pcl_fast.schedule import CLUSTERING_BATCH

# Of the pooling, and of the maps that it leaves 2 x 2 of.
_KERNEL, _SIDE = 6, 7


@torch.inference_mode()
def encode_maps(
    pretrained: Pretrained,
    images: ImageSet,
    data: DataConfig,
    world: World,
    progress: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Return float32 [n_local, 4 width]: this rank's shard of the last block's maps, pooled with kernel 6 and stride 1.

    An image's shorter side is resized to data.resize, then all of the image to a square of data.size, as the benchmark
    does. The features lie on the rank's device.

    Raises:
        UserError: the maps are not 7 x 7.
    """
    shard, device = range(*shard_bounds(len(images), world.rank, world.size)), world.device
    body, dtype = fold_batch_norm(before_pooling(pretrained.backbone)).to(device), encoder_dtype(device)

    def pooled(batch: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            maps = body(normalise(batch.to(device, non_blocking=True), dtype)).float()
        _check_side(maps, data.size)
        return F.avg_pool2d(maps, _KERNEL, stride=1).flatten(1)

    # The width, and that the maps have the right size, on a rank without images too.
    [width] = pooled(torch.zeros(1, data.size, data.size, 3, dtype=torch.uint8))[0].shape
    found, done = torch.empty(len(shard), width, device=device), 0
    loader = DataLoader(
        _Squares(images, shard, data.resize, data.size),
        batch_size=CLUSTERING_BATCH,
        num_workers=pick_resources(data, device).workers,
        pin_memory=device.type == "cuda",
    )
    for batch in without_stacks(loader):
        found[done : done + len(batch)] = pooled(batch)
        done += len(batch)
        progress(done)
    return found


def before_pooling(backbone: nn.Module) -> nn.Module:
    """Return the part of a ResNet that maps images [N, 3, H, W] to the last block's maps [N, width, H', W']; of one of
    timm's networks too, where what it pools are maps.
    """
    if hasattr(backbone, "forward_features"):
        return _Maps(backbone)
    layers = itertools.takewhile(lambda layer: not isinstance(layer, nn.AdaptiveAvgPool2d), backbone.children())
    return nn.Sequential(*layers)


class _Maps(nn.Module):
    """What one of timm's networks pools."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.network.forward_features(images)
        return maps.movedim(-1, 1) if getattr(self.network, "output_fmt", None) == "NHWC" else maps


def _check_side(maps: torch.Tensor, size: int) -> None:
    if maps.ndim != 4:
        raise UserError("--protocol fair wants a network that pools feature maps; this one has none: --protocol pcl")
    height, width = maps.shape[2:]
    if (height, width) != (_SIDE, _SIDE):
        raise UserError(
            f"--protocol fair wants feature maps of {_SIDE} x {_SIDE}, and images of {size} px give {height} x "
            f"{width}: use --protocol pcl, or --size {size * _SIDE // height} if that is a size for this encoder"
        )


class _Squares(Dataset):
    """A range of images, each resized to `resize` at its shorter side and then to a square: uint8 [size, size, 3]."""

    def __init__(self, images: ImageSet, shard: range, resize: int, size: int):
        self.images, self.shard, self.resize, self.size = images, shard, resize, size

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, position: int) -> torch.Tensor:
        image = cut_ends(self.images.read(self.shard[position]))
        image = transform.resize(image, [self.resize], antialias=True)
        return to_bytes(transform.resize(image, [self.size, self.size], antialias=True))
