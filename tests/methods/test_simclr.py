"""SimCLR: what it has and has not, two ranks against one, and a whole run; test_all.py has what all methods promise."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launches import command, execute, train
from ranks import run_ranks
from steps import batch, part, same

from pcl_fast.config import PRESETS, Config
from pcl_fast.data import normalise
from pcl_fast.demo import small
from pcl_fast.distributed import shard_bounds
from pcl_fast.learner import Learner
from pcl_fast.losses import nt_xent
from pcl_fast.methods import build, check_method, method_class
from pcl_fast.nn.batch_norm import batch_norm_buffers
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import read_rows

FLAGS = shlex.split("""
    --data.views digits --data.size 16 --data.resize 20 --data.workers 0 --epochs 3 --optim.batch-size 12 --log-every 1
    --model.arch cifar_resnet8 --model.dim 16 --optim.warmup-epochs 1
    --evaluation.every 1 --evaluation.neighbours 5 --evaluation.ks 4
""")
OPTIONS = {"ranks": 2, "preset": "simclr", "tiny": FLAGS}


def tiny(**changes) -> Config:
    config = small("simclr")
    config = replace(config, model=replace(config.model, dim=8), optim=replace(config.optim, batch_size=6, lr=1.0))
    return replace(config, **changes)


def test_it_has_an_encoder_and_nothing_beside_it(alone):
    method = build(tiny(), alone, 6)
    assert {name.partition(".")[0] for name in method.state_dict()} == {"encoder"}
    assert set(method.encoders()) == {method.features().encoder} == {"query"}
    assert not any(method.expects(epoch) for epoch in range(30))
    weights, others = method.groups()
    assert (weights.decay, weights.adapt, others.decay, others.adapt) == (True, True, False, False)
    assert all(p.ndim > 1 for p in weights.parameters)
    assert all(p.ndim == 1 for p in others.parameters)


def test_the_preset_is_the_published_recipe(alone):
    config = PRESETS["simclr"][1]
    assert (config.epochs, config.optim.batch_size) == (200, 256)
    assert (config.optim.optimizer, config.optim.lr, config.optim.momentum) == ("lars", 0.3, 0.9)
    assert (config.optim.weight_decay, config.optim.warmup_epochs, config.optim.schedule) == (1e-6, 10, "cosine")
    assert (config.loss.temperature, config.model.head, config.model.sync_bn) == (0.1, "mlp_bn", True)
    view = build(replace(config, model=tiny().model), alone, 6).views[0]
    assert (view.size, view.min_area, view.jitter, view.jitter_share) == (224, 0.08, (0.8, 0.8, 0.8, 0.2), 0.8)
    assert (view.grey_share, view.blur_share, view.flip_share, view.grey_first) == (0.2, 0.5, 0.5, False)


def test_the_loss_is_nt_xent_of_both_views_encoded_in_one_batch(alone):
    """Batch norm's statistics are of both views together."""
    config = tiny()
    method, other = build(config, alone, 6), build(config, alone, 6)
    whole = batch()
    step = method(Learner(method, config, alone).inputs(whole, 0))
    a, b = other.encode(other.encoder, torch.cat(whole.views)).chunk(2)
    expected = nt_xent(a, b, 0.1)
    torch.testing.assert_close(step.loss, expected.mean())
    assert step.metrics["similarity"].item() == pytest.approx((a * b).sum(1).mean().item(), rel=1e-5)
    separate = nt_xent(*(other.encode(other.encoder, view) for view in whole.views), 0.1).mean()
    assert (separate - expected.mean()).abs() > 1e-3


class Exactly(method_class("simclr"), name="simclr in float64"):
    """In float32 rounding decides on which side of zero some activations are."""

    settings = ()

    def encode(self, encoder: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        backbone = encoder.backbone(normalise(images, torch.float32).double())
        return F.normalize(encoder.head(backbone), dim=1)


def steps_of(world, config: Config, number_of_steps: int):
    learner = Learner(build(replace(config, method=Exactly.name), world, 6).double(), config, world)
    rows = slice(*shard_bounds(6, world.rank, world.size))
    losses = []
    for number in range(number_of_steps):
        learner.set_rate(0, number, number_of_steps)
        losses.append(learner.step(part(batch(number), rows), number)["loss"])
    statistics = [buffer for _, buffer in batch_norm_buffers(learner.method)]
    return torch.stack(losses), [p.detach() for p in learner.method.parameters()], statistics


def test_two_ranks_learn_what_one_learns(alone):
    """With batch norm over both, and the loss over both ranks' views."""
    config = tiny()
    (losses, weights, statistics), (other_losses, other_weights, other_statistics) = run_ranks(2, steps_of, config, 3)
    assert same([*weights, *statistics], [*other_weights, *other_statistics])
    expected_losses, expected_weights, expected_statistics = steps_of(alone, config, 3)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close((losses + other_losses) / 2, expected_losses, **close)
    for ours, theirs in zip([*weights, *statistics], [*expected_weights, *expected_statistics], strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_views_of_an_image_come_together(alone):
    config = tiny()
    learner = Learner(build(config, alone, 6), config, alone)
    learner.set_rate(5)
    values = [learner.step(batch(), number) for number in range(25)]
    assert values[-1]["loss"] < 0.7 * values[0]["loss"]
    assert values[-1]["similarity"] > values[0]["similarity"]


def test_a_single_image_is_refused():
    config = tiny(optim=replace(tiny().optim, batch_size=1))
    with pytest.raises(ValueError, match=r"--optim\.batch-size 1 leaves an image nothing to be contrasted with"):
        method_class("simclr").check(config, 100, 1)


OF_PCL = (
    r"is a setting of [\w, ]*\bpcl\b[\w, ]*, and this run's method is simclr, whose own settings are "
    r"--loss\.temperature, --model\.sync"
)
OF_SIMCLR = (
    r"is a setting of [\w, ]*\bsimclr\b[\w, ]*, and this run's method is pcl, whose own settings are --cluster\.\*"
)


@pytest.mark.parametrize(
    ("preset", "group", "changes", "message"),
    [
        ("simclr", "cluster", {"ks": (5,)}, rf"--cluster\.ks {OF_PCL}"),
        ("simclr", "model", {"queue_size": 5}, rf"--model\.queue-size {OF_PCL}"),
        ("pcl_v2", "model", {"sync_bn": True}, rf"--model\.sync-bn {OF_SIMCLR}"),
    ],
)
def test_settings_of_another_method_are_refused(preset, group, changes, message):
    config = PRESETS[preset][1]
    with pytest.raises(ValueError, match=message):
        check_method(replace(config, **{group: replace(getattr(config, group), **changes)}))


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory) -> Path:
    """An uninterrupted run on two ranks."""
    output = tmp_path_factory.mktemp("simclr")
    train(image_folder, output, **OPTIONS)
    return output


def test_end_to_end(whole):
    rows = read_rows(whole)
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == 12
    assert all(set(row) == {"kind", "step", "epoch", "loss", "similarity", "lr"} for row in steps)
    assert [row["lr"] for row in steps[:4]] == pytest.approx([0.075, 0.15, 0.225, 0.3])
    assert [row["kind"] for row in rows].count("clustering") == 0
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [sorted(row["ami"]) for row in evaluations] == [["4"]] * 4
    assert set(load_checkpoint(whole)["encoders"]) == {"query"}
    assert (whole / "report.png").stat().st_size > 0


def test_another_method_s_run_is_not_gone_on_with(whole, image_folder):
    done = execute(command(image_folder, whole))
    assert done.returncode != 0
    assert "holds a run of the method simclr, not of pcl" in done.stderr
    assert "its own preset, simclr" in done.stderr
    assert "Traceback" not in done.stderr
