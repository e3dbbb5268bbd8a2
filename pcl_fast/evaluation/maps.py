"""Features of the FAIR benchmark's SVMs: the last feature map of a whole image, pooled to 2 x 2."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transform

from pcl_fast.config import DataConfig
from pcl_fast.data import ImageSet, normalise
from pcl_fast.data.loaders.resources import pick_resources
from pcl_fast.data.views.pil import to_bytes
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.errors import UserError
from pcl_fast.nn.batch_norm import fold_batch_norm
from pcl_fast.nn.precision import autocast, encoder_dtype
from pcl_fast.pretrained import Pretrained
from pcl_fast.schedule import CLUSTERING_BATCH

# Of the pooling, and the map that it leaves 2 x 2 of.
_KERNEL, _SIDE = 6, 7


class _Squares(Dataset):
    """A range of images, each resized to `resize` at its shorter side and then to a square: uint8 [size, size, 3]."""

    def __init__(self, images: ImageSet, shard: range, resize: int, size: int):
        self.images, self.shard, self.resize, self.size = images, shard, resize, size

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, position: int) -> torch.Tensor:
        image = transform.resize(self.images.read(self.shard[position]), [self.resize], antialias=True)
        return to_bytes(transform.resize(image, [self.size, self.size], antialias=True))


@torch.inference_mode()
def encode_maps(
    pretrained: Pretrained,
    images: ImageSet,
    data: DataConfig,
    world: World,
    progress: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Return float32 [n_local, 4 width]: this rank's shard of the last block's maps, pooled with kernel 6 and stride 1.

    Raises:
        UserError: the maps are not 7 x 7.
    """
    shard, device = range(*shard_bounds(len(images), world.rank, world.size)), world.device
    # All but the pooling and what follows it.
    body = fold_batch_norm(nn.Sequential(*list(pretrained.backbone.children())[:-2])).to(device)
    loader = DataLoader(
        _Squares(images, shard, data.resize, data.size),
        batch_size=CLUSTERING_BATCH,
        num_workers=pick_resources(data, device).workers,
    )
    found, done = [torch.empty(0, 4 * pretrained.width)], 0
    for batch in loader:
        with autocast(device):
            maps = body(normalise(batch.to(device), encoder_dtype(device))).float()
        if maps.shape[2:] != (_SIDE, _SIDE):
            raise UserError(
                f"the protocol fair wants feature maps of {_SIDE} x {_SIDE}, and images of {data.size} px give "
                f"{maps.shape[2]} x {maps.shape[3]}; use --size {_SIDE * 32} with a ResNet for large images, or "
                "--protocol pcl"
            )
        found.append(F.avg_pool2d(maps, _KERNEL, stride=1).flatten(1).cpu())
        done += len(batch)
        progress(done)
    return torch.cat(found)
