"""A collapse, all features alike, is said in words once, with what to change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from steps import batch, learner_of, small_config

from pcl_fast.config import with_settings
from pcl_fast.methods.pcl import _spread
from pcl_fast.run.metrics import read_rows
from pcl_fast.train import run


def test_the_spread_is_that_of_every_two_keys():
    keys = F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) + 0.5, dim=1)
    cosines = [float(keys[i] @ keys[j]) for i in range(7) for j in range(7) if i != j]
    assert float(_spread(keys)["key_spread"]) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)
    assert float(_spread(keys.half())["key_spread"]) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-3)
    assert float(_spread(keys[:1].expand(9, 5))["key_spread"]) == pytest.approx(0, abs=1e-6)
    assert _spread(keys[:1]) == {}


def test_a_step_reports_it(alone):
    learner = learner_of(small_config(), alone)
    assert 0.001 < learner.step(batch(), 0)["key_spread"] < 2
    for encoder in (learner.method.encoder, learner.method.momentum_encoder):
        torch.nn.init.zeros_(encoder.head[2].weight)
        torch.nn.init.ones_(encoder.head[2].bias)
    learner.method.average.update()
    assert learner.step(batch(), 1)["key_spread"] < 1e-4


def test_a_warning_waits_until_the_momentum_encoder_has_followed(alone):
    config = small_config()
    method = learner_of(replace(config, model=replace(config.model, momentum=0.99)), alone).method
    assert method.warning({"key_spread": 0.001}, 499) is None
    assert method.warning({"key_spread": 0.011}, 501) is None
    assert method.warning({}, 501) is None
    text = method.warning({"key_spread": 0.001}, 501)
    assert "(cosine similarity 0.999 on average): they have collapsed" in text
    for flag in ("--optim.lr 0.06", "--optim.warmup-epochs 0", "--optim.weight-decay 0.0005", "--model.momentum 0.99"):
        assert flag in text


@pytest.mark.slow
def test_a_run_that_collapses_says_so_once(image_folder, tmp_path, alone, capsys):
    changes = {"output": tmp_path, "epochs": 4, "data.root": image_folder, "data.loader": "torchvision"}
    changes |= {"data.size": 8, "optim.batch_size": 12, "evaluation.every": 0}
    changes |= {"model.momentum": 0.0, "optim.weight_decay": 3.0}  # of which either is enough
    assert run(with_settings(small_config(), changes), alone)
    assert capsys.readouterr().out.count("warning: the momentum features") == 1
    spreads = [row["key_spread"] for row in read_rows(tmp_path) if row["kind"] == "epoch"]
    assert len(spreads) == 4
    assert max(spreads[2:]) < 0.01
