"""Maps pooled to 2 x 2, against loops over images and windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from test_command import ALONE, run_folder  # noqa: F401  a fixture

from pcl_fast.config import DataConfig
from pcl_fast.data import find_images, normalise
from pcl_fast.distributed import World, all_gather_shards
from pcl_fast.errors import UserError
from pcl_fast.evaluation.pooled_maps import encode_maps
from pcl_fast.pretrained import Pretrained, read_pretrained

# cifar_resnet8 divides a side by four, so that 28 px give maps of 7 x 7.
DATA = DataConfig(size=28, resize=32, workers=0)


def slow(pretrained: Pretrained, path: Path) -> list[float]:
    """The features of one image."""
    with Image.open(path) as image:
        width, height = image.size
        wider = 32 / min(width, height)
        image = image.resize((int(width * wider), int(height * wider)), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image.resize((28, 28), Image.Resampling.BILINEAR)))
    kept = []
    last = [layer for layer in pretrained.backbone.modules() if type(layer).__name__ == "BasicBlock"][-1]
    hook = last.register_forward_hook(lambda layer, inputs, output: kept.append(output))
    with torch.no_grad():
        pretrained.backbone(normalise(pixels[None], torch.float32))
    hook.remove()
    [[maps]] = kept
    return [
        float(channel[top : top + 6, left : left + 6].mean()) for channel in maps for top in (0, 1) for left in (0, 1)
    ]


def encoded(world: World, folder: Path, data: Path) -> torch.Tensor:
    images = find_images(data).subset(range(5, 12))
    shard = encode_maps(read_pretrained(folder, "query"), images, DATA, world)
    return all_gather_shards(shard, world.group)


def test_maps_equal_loops_on_any_number_of_ranks(run_folder, image_folder):  # noqa: F811
    images = find_images(image_folder)
    pretrained = read_pretrained(run_folder, "query")
    expected = torch.tensor([slow(pretrained, images.path(index)) for index in range(5, 12)])
    assert expected.shape == (7, 4 * 64)
    for found in (encoded(ALONE, run_folder, image_folder), *run_ranks(2, encoded, run_folder, image_folder)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_other_maps_are_refused(run_folder, image_folder):  # noqa: F811
    pretrained, images = read_pretrained(run_folder, "query"), find_images(image_folder)
    with pytest.raises(UserError, match="wants feature maps of 7 x 7, and images of 12 px give 3 x 3: use --protocol"):
        encode_maps(pretrained, images, replace(DATA, size=12), ALONE)
