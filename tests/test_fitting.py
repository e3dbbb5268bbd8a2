"""Settings that follow from the number of images."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pcl_fast.config import PRESETS, Config, validate
from pcl_fast.fitting import automatic_ks, fit
from pcl_fast.methods import method_class
from pcl_fast.train import run

DEMO = PRESETS["demo"][1]


def with_auto(config: Config, **model) -> Config:
    return replace(config, cluster=replace(config.cluster, ks="auto"), model=replace(config.model, **model))


@pytest.mark.parametrize(
    ("images", "ks"),
    [
        (1_281_167, (25120, 49275, 98551)),
        (126_689, (2484, 4872, 9745)),
        (50_000, (980, 1923, 3846)),
        (53, (2, 4)),
        (30, (2,)),
        (2, (2,)),
        (1, (1,)),
    ],
)
def test_automatic_numbers_of_clusters_have_the_paper_s_ratios(images, ks):
    assert automatic_ks(images) == ks


def test_queue_and_negatives_are_at_most_as_many_as_images():
    config = with_auto(PRESETS["pcl_v1"][1])
    validate(config)
    fitted, lines = fit(config, 5000)
    assert (fitted.cluster.ks, fitted.model.queue_size, fitted.loss.num_negatives) == ((98, 192, 384), 5000, 5000)
    assert lines == [
        "--cluster.ks auto for 5000 images is 98 192 384, with --model.queue-size 5000 and --loss.num-negatives 5000"
    ]
    every = replace(config, loss=replace(config.loss, num_negatives=None))
    fitted, _ = fit(every, 1_281_167)
    assert (fitted.model, fitted.loss) == (every.model, every.loss)


def test_what_is_given_stays():
    assert fit(DEMO, 10) == (DEMO, [])


def test_advice_for_a_tiny_set_is_of_use():
    with pytest.raises(ValueError, match=r"set --cluster\.ks to smaller numbers, or to auto, which is 2 4 here"):
        method_class("pcl").check(DEMO, 53, 1)
    assert max(automatic_ks(53)) <= 53


@pytest.mark.slow
def test_a_run_records_what_was_chosen_and_goes_on(image_folder, tmp_path, alone, capsys):
    config = with_auto(DEMO, dim=8)
    config = replace(
        config,
        output=tmp_path,
        epochs=1,
        data=replace(DEMO.data, root=image_folder),
        optim=replace(DEMO.optim, batch_size=50),
        cluster=replace(config.cluster, warmup_epochs=0),
        evaluation=replace(DEMO.evaluation, every=0),
    )
    assert run(config, alone)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["cluster"]["ks"], saved["model"]["queue_size"]) == ([2, 4], 53)
    assert "--cluster.ks auto for 53 images is 2 4" in capsys.readouterr().out
    for again in (
        config,
        replace(config, cluster=replace(config.cluster, ks=(2, 4)), model=replace(config.model, queue_size=53)),
    ):
        assert run(again, alone)
        assert "nothing left to do" in capsys.readouterr().out
