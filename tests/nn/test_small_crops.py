"""Small crops that a run cannot have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pcl_fast.config import PRESETS, Config
from pcl_fast.crop_sizes import Stage
from pcl_fast.nn.small_crops import check_crop_size

FLAG = "--swav.small-size"


def recipe(arch: str = "resnet50", *stages: Stage) -> Config:
    config = PRESETS["simclr"][1]
    return replace(config, model=replace(config.model, arch=arch), data=replace(config.data, sizes=stages))


def test_sizes_that_can_be_made():
    for size in (1, 96, 224):
        check_crop_size(FLAG, size, recipe())


@pytest.mark.parametrize("size", [-1, 0, 225])
def test_sizes_that_no_small_crop_has(size):
    with pytest.raises(ValueError, match=rf"--swav.small-size {size}: .*--data.size 224"):
        check_crop_size(FLAG, size, recipe())


def test_what_the_network_does_not_take_is_said_by_the_flag():
    """At the crops' full size, and at that of an earlier epoch."""
    pytest.importorskip("timm")
    arch = "timm/vit_tiny_patch16_224"
    check_crop_size(FLAG, 96, recipe(arch))
    with pytest.raises(ValueError, match=r"--swav.small-size 90: .*images of 90 px .*use another --swav.small-size or"):
        check_crop_size(FLAG, 90, recipe(arch))
    check_crop_size(FLAG, 112, recipe(arch, Stage(160, 10)))
    with pytest.raises(ValueError, match=r"--swav.small-size 96: .*images of 69 px"):
        check_crop_size(FLAG, 96, recipe(arch, Stage(160, 10)))
