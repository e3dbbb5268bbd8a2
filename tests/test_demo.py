"""The demo's scores, and its command for any preset. `make demo` runs all of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tyro
from PIL import Image

from pcl_fast.config import PRESETS, changed_settings, to_dict, validate, with_settings
from pcl_fast.crop_sizes import Stage
from pcl_fast.demo import as_label_table, as_table, flags, score_all, small, without_prototypes
from pcl_fast.learner import Learner
from pcl_fast.methods import build, check_method
from pcl_fast.run.checkpoint import save_checkpoint


@pytest.mark.slow
def test_an_encoder_that_learned_nothing_scores_as_the_untrained_one(tmp_path, alone):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 28, 28), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / "digits" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03}.jpg")
    config = PRESETS["demo"][1]
    learner = Learner(build(config, alone, 200), config, alone)
    save_checkpoint(tmp_path, {"config": to_dict(config), **learner.state()})
    rows, label_rows = score_all(config, {"trained": tmp_path}, tmp_path / "digits")
    assert label_rows["trained"] == label_rows["untrained"]
    assert label_rows["raw pixels"].semi is None
    assert as_label_table(label_rows).row_count == 3
    assert rows["trained, backbone"] == rows["untrained, backbone"]
    assert rows["trained, 128-d"] == rows["untrained, 128-d"]
    assert rows["raw pixels"] != rows["untrained, backbone"]
    assert as_table(rows).row_count == 5


@pytest.mark.parametrize("preset", PRESETS)
def test_a_miniature_s_flags_make_it_what_it_is(preset):
    """Parsed as the command line is, they give the same configuration."""
    config = small(preset)
    validate(config)
    check_method(config)
    parsed = tyro.extras.overridable_config_cli(PRESETS, args=[preset, *flags(config)])
    assert replace(parsed, output=config.output) == config


def test_without_prototypes_all_else_is_the_same():
    config = small("demo")
    assert changed_settings(config, without_prototypes(config)) == ["cluster.ks", "evaluation.ks"]
    parsed = tyro.extras.overridable_config_cli(PRESETS, args=["demo", *flags(without_prototypes(config))])
    assert parsed.cluster.ks == ()


def test_flags_switch_on_and_off():
    for value in (True, False):
        config = with_settings(PRESETS["simclr"][1], {"model.sync_bn": value, "optim.scale_lr": value})
        parsed = tyro.extras.overridable_config_cli(PRESETS, args=["simclr", *flags(config)])
        assert (parsed.model.sync_bn, parsed.optim.scale_lr) == (value, value)


def test_miniatures_differ_in_what_makes_their_method_alone():
    pcl, moco = small("pcl_v2"), small("moco_v2")
    differences = changed_settings(pcl, moco)
    assert [name for name in differences if not name.startswith("cluster.")] == ["evaluation.ks", "output", "preset"]
    assert (pcl.cluster.ks, moco.evaluation.ks) == ((15, 30, 60), (15, 30, 60))
    assert changed_settings(small("pcl_v1"), PRESETS["demo"][1]) == ["model.head", "output", "preset"]


def test_the_miniature_s_crops_grow_in_the_same_shares():
    data = small("pcl_v2_fast").data
    assert (data.sizes, data.size) == ((Stage(14, 14), Stage(17, 19)), 20)
    assert small("pcl_v2").data.sizes == ()
