"""Presets, and what makes two recipes differ."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tyro

from pcl_fast.augmentations import AUGMENTATIONS, View
from pcl_fast.config import PRESETS, data_config, doubts, recipe_differences, to_dict, validate, view_of

replace = dataclasses.replace


def preset(name: str):
    return PRESETS[name][1]


def parse(*arguments: str):
    return tyro.extras.overridable_config_cli(PRESETS, args=arguments)


def test_pcl_v1_is_the_paper_s():
    c = preset("pcl_v1")
    assert (c.epochs, c.optim.batch_size, c.optim.lr, c.optim.momentum, c.optim.weight_decay) == (
        200, 256, 0.03, 0.9, 1e-4,
    )  # fmt: skip
    assert (c.optim.schedule, c.optim.milestones) == ("step", (120, 160))
    assert (c.loss.temperature, c.loss.num_negatives) == (0.1, 16384)
    assert (c.model.arch, c.model.head, c.model.dim) == ("resnet50", "linear", 128)
    assert (c.model.momentum, c.model.queue_size) == (0.999, 16384)
    assert (c.cluster.ks, c.cluster.warmup_epochs) == ((25000, 50000, 100000), 20)
    assert (c.cluster.iterations, c.cluster.redo, c.cluster.alpha) == (20, 5, 10)
    assert (c.data.size, c.data.shorter_side, c.data.min_crop_area, c.data.views) == (224, 256, 0.2, "v1")


def test_v2_adds_head_blur_temperature_and_cosine():
    assert recipe_differences(to_dict(preset("pcl_v1")), to_dict(preset("pcl_v2"))) == [
        "data.views: v1 -> v2",
        "loss.temperature: 0.1 -> 0.2",
        "model.head: linear -> mlp",
        "optim.schedule: step -> cosine",
    ]


def test_what_the_fast_preset_leaves_of_the_paper_are_these_flags():
    assert recipe_differences(to_dict(preset("pcl_v2")), to_dict(preset("pcl_v2_fast"))) == [
        "cluster.features: pass -> keys",
        "cluster.init: random -> previous",
        "cluster.warm_iterations: 5 -> 10",
        "data.sizes: [] -> [[160, 120], [192, 160]]",
    ]
    assert doubts(preset("pcl_v2_fast")) == []


@pytest.mark.parametrize(("version", "temperature"), [("v1", 0.07), ("v2", 0.2)])
def test_moco_is_pcl_without_prototypes(version, temperature):
    moco = preset(f"moco_{version}")
    assert moco.cluster.ks == ()
    assert (moco.model.queue_size, moco.loss.temperature) == (65536, temperature)
    assert moco.optim == preset(f"pcl_{version}").optim


def test_command_line_takes_preset_first_and_any_field():
    config = parse(
        "pcl_v2", "--data", "/images", "--output", "runs/x", "--cluster.ks", "10", "20", "--optim.lr", "0.1",
        "--loss.num-negatives", "None", "--data.workers", "3",
    )  # fmt: skip
    assert (config.data.root, config.output) == (Path("/images"), Path("runs/x"))
    assert (config.cluster.ks, config.optim.lr, config.loss.num_negatives) == ((10, 20), 0.1, None)
    assert (config.model.head, config.data.workers, config.preset) == ("mlp", 3, "pcl_v2")
    assert parse("pcl_v2", "--cluster.ks").cluster.ks == ()


def test_an_augmentation_is_one_entry(monkeypatch, capsys):
    """The command line lists those that there are, a recipe holds the name alone, and the run's size goes with it."""
    with pytest.raises(SystemExit):
        parse("pcl_v2", "--help")
    assert f"{{{','.join(AUGMENTATIONS)}}}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse("pcl_v2", "--data.views", "v9")
    message = capsys.readouterr().err
    assert all(name in message for name in ("--data.views", *AUGMENTATIONS))
    assert parse("pcl_v1", "--data.views", "digits").data.views == "digits"

    config = preset("pcl_v1")
    config = replace(config, data=replace(config.data, views="v9", size=96, min_crop_area=0.08))
    with pytest.raises(ValueError, match=f"--data.views must be one of {', '.join(AUGMENTATIONS)}, got v9"):
        validate(config)
    monkeypatch.setitem(AUGMENTATIONS, "v9", View(grey_share=0.7))
    validate(config)
    assert view_of(config.data) == View(size=96, min_area=0.08, grey_share=0.7)
    assert to_dict(config)["data"]["views"] == "v9"


@pytest.mark.parametrize("options", [{"redo": 1}, {"iterations": 5}])
def test_starts_are_left_early_only_where_there_are_others_and_time(options):
    config = preset("pcl_v2")
    validate(replace(config, cluster=replace(config.cluster, prune_starts=True)))
    with pytest.raises(ValueError, match=r"--cluster\.prune-starts .* after 5 iterations: it needs --cluster\.redo"):
        validate(replace(config, cluster=replace(config.cluster, prune_starts=True, **options)))


def test_more_workers_than_any_machine_has_cores_are_refused():
    config = preset("pcl_v1")
    validate(replace(config, data=replace(config.data, workers=1024)))
    with pytest.raises(ValueError, match=r"--data\.workers 100000: .* use at most 1024"):
        validate(replace(config, data=replace(config.data, workers=100_000)))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    config = preset(name)
    validate(config)
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)
    assert config.preset == name


def test_places_and_printing_are_not_part_of_the_recipe():
    config = preset("pcl_v1")
    moved = replace(
        config,
        output=Path("/elsewhere"),
        log_every=3,
        data=replace(config.data, root=Path("/other"), workers=1, cache=Path("/ssd")),
        evaluation=replace(config.evaluation, every=1),
        checkpoint=replace(config.checkpoint, keep_every=1),
    )
    assert recipe_differences(to_dict(config), to_dict(moved)) == []


def test_a_field_that_is_newer_than_the_run_counts_as_its_default():
    config = preset("pcl_v1")
    saved = to_dict(config)
    del saved["cluster"]["init"], saved["cluster"]["warm_iterations"]
    assert recipe_differences(saved, to_dict(config)) == []
    warm = replace(config, cluster=replace(config.cluster, init="previous"))
    assert recipe_differences(saved, to_dict(warm)) == ["cluster.init: random -> previous"]


def of_size(size: int, resize: int | None):
    config = preset("pcl_v1")
    return replace(config, data=replace(config.data, size=size, resize=resize))


@pytest.mark.parametrize(("size", "shorter_side"), [(224, 256), (96, 110), (64, 73), (32, 37)])
def test_the_resize_goes_with_the_size_unless_given(size, shorter_side):
    derived = of_size(size, None)
    assert parse("pcl_v1", "--data.size", str(size)).data == derived.data
    assert derived.data.shorter_side == shorter_side
    assert of_size(size, 300).data.shorter_side == 300
    assert doubts(derived) == []
    # A run that was saved when the resize had a number of its own may go on.
    assert recipe_differences(to_dict(of_size(size, shorter_side)), to_dict(derived)) == []
    assert data_config(to_dict(derived)).resize == shorter_side
    if size != 224:
        difference = f"data.resize: 256 -> {shorter_side}"
        assert recipe_differences(to_dict(of_size(size, 256)), to_dict(derived)) == [difference]


def test_a_resize_that_hides_most_of_every_image_is_doubted():
    assert doubts(of_size(224, 316)) == []
    assert doubts(of_size(32, 256)) == [
        "--data.resize 256 beside --data.size 32 shows k-means and kNN the central 2% of every image; without that "
        "flag it is 37"
    ]


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("optim", "lr", 0.0, "--optim.lr must be positive, got 0.0"),
        ("optim", "lr", math.inf, "--optim.lr must be a finite number, got inf"),
        ("optim", "batch_size", 0, "--optim.batch-size"),
        ("optim", "momentum", 1.0, r"--optim.momentum is a share in \[0, 1\), got 1.0"),
        ("optim", "momentum", -0.1, "--optim.momentum is a share"),
        ("optim", "momentum", math.nan, "--optim.momentum must be a finite number"),
        ("optim", "weight_decay", -1e-4, "--optim.weight-decay must not be negative, got -0.0001"),
        ("optim", "weight_decay", math.nan, "--optim.weight-decay must be a finite number, got nan"),
        ("optim", "trust", 0.0, "--optim.trust must be positive, got 0.0"),
        ("optim", "trust", math.inf, "--optim.trust must be a finite number, got inf"),
        ("optim", "warmup_epochs", -1, "--optim.warmup-epochs must not be negative, got -1"),
        ("loss", "temperature", -1.0, "--loss.temperature"),
        ("loss", "num_negatives", 0, "--loss.num-negatives"),
        ("model", "momentum", 1.5, "--model.momentum.*1.5"),
        ("data", "min_crop_area", 0.0, "--data.min-crop-area"),
        ("data", "resize", 100, "--data.resize 100 is smaller than the crop, --data.size 224"),
        ("model", "bn_splits", 0, "--model.bn-splits must be positive, got 0"),
        ("model", "hidden", 0, "--model.hidden must be positive, got 0"),
        ("model", "hidden", 64, "--model.hidden 64 is the width between two layers, and --model.head linear has one"),
        ("cluster", "ks", (5, 0), "--cluster.ks"),
        ("cluster", "alpha", 0.0, "--cluster.alpha"),
        ("cluster", "warmup_epochs", -1, "--cluster.warmup-epochs must not be negative, got -1"),
        ("evaluation", "every", -1, "--evaluation.every"),
    ],
)
def test_values_that_cannot_work_name_their_flag(group, field, value, message):
    config = preset("pcl_v1")
    config = replace(config, **{group: replace(getattr(config, group), **{field: value})})
    with pytest.raises(ValueError, match=message):
        validate(config)
