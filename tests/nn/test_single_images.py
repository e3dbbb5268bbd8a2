"""Batches of one image under batch norm: refused before the run where a channel has a single value, else computed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from faults.tiny import tiny

from pcl_fast.config import PRESETS, Config, with_settings
from pcl_fast.crop_sizes import Stage
from pcl_fast.methods import method_class
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.single_images import check_single_images
from pcl_fast.train import run


def recipe(**settings) -> Config:
    settings = {name.replace("__", "."): value for name, value in settings.items()}
    return with_settings(PRESETS["pcl_v1"][1], {"model.arch": "resnet18", "data.resize": None, **settings})


def trains(config: Config) -> bool:
    """What the check should find out, by the step's own passes."""
    sides = [config.data.at(epoch).size for epoch in range(config.epochs)]
    encoder = Encoder(config.model).train()
    try:
        encoder(torch.randn(config.model.bn_splits, 3, min(sides), min(sides)))
    except ValueError:
        return False
    return True


def _refusal(settings: dict, side: int) -> str:
    if "bn" in settings.get("model__head", ""):
        cause, other = r"--model\.head mlp_inner_bn has", r"a --model\.head without batch norm"
    else:
        cause, other = rf"--model\.arch \w+ has, at {side} px,", "larger crops"
    return rf"--optim\.batch-size 1 leaves .* {cause} a single value .*; use --optim\.batch-size 2 or {other}$"


@pytest.mark.parametrize(
    ("settings", "side"),
    [
        ({"data__size": 32}, 32),
        ({"data__size": 33}, None),
        ({"data__size": 64}, None),
        ({"data__size": 32, "model__small_stem": True}, None),
        ({"data__size": 64, "data__sizes": (Stage(32, 3),)}, 32),
        ({"data__size": 64, "data__sizes": (Stage(48, 3),)}, None),
        ({"data__size": 64, "model__head": "mlp"}, None),
        ({"data__size": 64, "model__head": "mlp_inner_bn"}, 64),
        ({"data__size": 8, "model__arch": "cifar_resnet8"}, None),
        ({"data__size": 4, "model__arch": "cifar_resnet8"}, 4),
    ],
)
def test_one_image_is_refused_where_a_channel_has_one_value(settings, side):
    config = recipe(**settings, optim__batch_size=1)
    assert trains(config) == (side is None)
    check_single_images(config, 2)
    if side is None:
        check_single_images(config, 1)
        return
    with pytest.raises(ValueError, match=_refusal(settings, side)):
        check_single_images(config, 1)


@pytest.mark.parametrize(
    ("settings", "ranks", "use"),
    [
        ({"optim__batch_size": 2}, 2, "--optim.batch-size 4"),
        ({"optim__batch_size": 4, "model__bn_splits": 4}, 1, "--optim.batch-size 8, fewer --model.bn-splits than 4"),
        (
            {"optim__batch_size": 8, "model__bn_splits": 2, "optim__accumulate": 4},
            1,
            "--optim.batch-size 16, fewer --model.bn-splits than 2, fewer parts than --optim.accumulate 4",
        ),
    ],
)
def test_methods_refuse_it_by_the_flags_that_make_it_so(settings, ranks, use):
    config = recipe(data__size=32, cluster__ks=(), **settings)
    with pytest.raises(ValueError, match=f"one image at a time .*; use {re.escape(use)} or larger crops$"):
        method_class("pcl").check(config, 100, ranks)
    twice = replace(config, optim=replace(config.optim, batch_size=2 * config.optim.batch_size))
    method_class("pcl").check(twice, 100, ranks)
    if config.model.bn_splits == 1:
        negatives = replace(config, loss=replace(config.loss, num_negatives=None))
        with pytest.raises(ValueError, match="one image at a time"):
            method_class("instdisc").check(negatives, 100, ranks)


@pytest.mark.parametrize(
    ("settings", "ranks", "refused"),
    [
        ({"swav.small_crops": 1}, 2, True),
        ({"swav.small_crops": 2}, 2, False),
        ({"swav.small_crops": 1}, 1, False),
        ({"swav.small_crops": 1, "model.sync_bn": True}, 2, False),
        ({"swav.small_crops": 1, "swav.small_size": 40}, 2, False),
        ({"swav.small_crops": 1, "data.size": 32}, 2, False),
        ({"swav.small_crops": 1, "swav.small_size": 63, "data.sizes": (Stage(8, 1),)}, 2, False),
    ],
)
def test_one_small_crop_of_one_image(settings, ranks, refused):
    """The head, which has batch norm, has the large crops' features beside."""
    settings = {"model.arch": "resnet18", "model.sync_bn": False, "data.size": 64, "swav.small_size": 32} | settings
    config = with_settings(PRESETS["swav"][1], settings | {"swav.prototypes": 9, "optim.batch_size": 2})
    if refused:
        with pytest.raises(ValueError, match=r"leaves a rank one image at a time .* at 32 px"):
            method_class("swav").check(config, 100, ranks)
    else:
        method_class("swav").check(config, 100, ranks)


@pytest.mark.parametrize("arch", ["timm/vit_tiny_patch16_224", "timm/none", "resnet17"])
def test_what_else_is_wrong_is_said_when_the_network_is_built(arch):
    config = recipe(model__arch=arch, data__size=33, optim__batch_size=1, cluster__ks=())
    check_single_images(config, 1)


def test_a_run_of_single_images_trains_where_it_can(image_folder, tmp_path, alone):
    config = tiny(image_folder, tmp_path / "whole", epochs=1)
    config = replace(config, optim=replace(config.optim, batch_size=1), model=replace(config.model, bn_splits=1))
    assert run(config, alone)
    small = replace(config, output=tmp_path / "small", data=replace(config.data, size=4, resize=None))
    with pytest.raises(ValueError, match=r"--optim\.batch-size 1 .*cifar_resnet8"):
        run(small, alone)
    assert not (tmp_path / "small" / "checkpoint.pt").exists()
