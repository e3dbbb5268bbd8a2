"""BYOL: what it has and has not, a step against one written out in float64, two ranks against one, and a whole run;
test_every_method.py has what all methods promise.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import same as same_values
from ranks import run_ranks
from steps import batch, part, same

import pcl_fast.methods.byol
from pcl_fast.augmentations import View
from pcl_fast.config import PRESETS, Config, to_dict, with_settings
from pcl_fast.data import normalise
from pcl_fast.demo import small
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.learner import FINITE, Learner
from pcl_fast.methods import build, check_method, method_class
from pcl_fast.methods.collapse import spread
from pcl_fast.nn.batch_norm import batch_norm_buffers
from pcl_fast.pretrained import read_pretrained
from pcl_fast.pretrained.beginning import begin_with
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.continuing import check_same_run, check_taken_up
from pcl_fast.run.metrics import read_rows
from pcl_fast.train import run

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, EPOCHS = 6, 4  # of a batch, which is the data set: as many steps as epochs


def tiny(**changes: Any) -> Config:
    """In names of changes a double underscore is a dot."""
    usual = {"model.dim": 8, "model.hidden": 32, "optim.batch_size": ROWS, "epochs": EPOCHS, "optim.warmup_epochs": 0}
    return with_settings(small("byol"), usual | {k.replace("__", "."): v for k, v in changes.items()})


def ready(world: World, config: Config | None = None) -> Learner:
    config = config or tiny()
    learner = Learner(build(config, world, ROWS), config, world)
    learner.set_rate(0)
    return learner


# --- what it is -------------------------------------------------------------------------------------------------------


def test_the_preset_is_the_published_recipe_with_fewer_epochs():
    config = PRESETS["byol"][1]
    assert (config.epochs, config.optim.batch_size, config.model.momentum) == (200, 256, 0.996)
    assert (config.optim.optimizer, config.optim.lr, config.optim.momentum) == ("lars", 0.2, 0.9)
    assert (config.optim.weight_decay, config.optim.warmup_epochs, config.optim.schedule) == (1.5e-6, 10, "cosine")
    assert (config.model.hidden, config.model.dim, config.model.sync_bn) == (4096, 256, True)


def test_each_view_has_an_augmentation_of_its_own(alone):
    config = replace(PRESETS["byol"][1], model=tiny().model)
    first, second = build(config, alone, ROWS).views
    jitter = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_share": 0.8}
    common = View(size=224, min_area=0.08, **jitter, grey_share=0.2, sigma=(0.1, 2.0), flip_share=0.5)
    assert first == replace(common, blur_share=1.0)
    assert second == replace(common, blur_share=0.1, solarise_share=0.2)
    first, second = build(tiny(), alone, ROWS).views  # another augmentation
    assert first == second


def test_it_has_an_encoder_a_predictor_and_a_momentum_encoder(alone):
    method = build(tiny(model__hidden=20), alone, ROWS)
    assert {name.partition(".")[0] for name in method.state_dict()} == {"encoder", "predictor", "momentum_encoder"}
    assert method.encoders() == {"query": method.encoder, "momentum": method.momentum_encoder}
    assert (method.features().encoder, method.features().width) == ("query", 8)
    same_values(method.encoder.state_dict(), method.momentum_encoder.state_dict(), "at first")
    for layers, width in ((method.encoder.head, 64), (method.predictor, 8)):
        assert [type(layer).__name__ for layer in layers] == ["Linear", "SyncBatchNorm1d", "ReLU", "Linear"]
        assert [list(layers[i].weight.shape) for i in (0, 3)] == [[20, width], [8, 20]]
        assert layers[0].bias is layers[3].bias is None
    weights, others = method.groups()
    learned = {id(p) for name, p in method.named_parameters() if not name.startswith("momentum_encoder.")}
    assert {id(p) for p in [*weights.parameters, *others.parameters]} == learned
    assert (weights.decay, weights.adapt, others.decay, others.adapt) == (True, True, False, False)
    assert all(p.ndim == 1 for p in others.parameters)


# --- a step -----------------------------------------------------------------------------------------------------------


class Exactly(method_class("byol"), name="byol in float64"):
    """In float32 rounding decides on which side of zero some activations are."""

    settings = ()

    def encode(self, encoder, images: torch.Tensor):
        return encoder(normalise(images, torch.float32).double())


def exactly(world: World, config: Config) -> Learner:
    learner = Learner(build(replace(config, method=Exactly.name), world, ROWS).double(), config, world)
    learner.set_rate(0)
    return learner


def layers(x: torch.Tensor, sequence: torch.nn.Module) -> torch.Tensor:
    """Linear, batch norm of the batch's own statistics, ReLU, linear."""
    x = x @ sequence[0].weight.T
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * sequence[1].weight + sequence[1].bias
    return x.clamp(min=0) @ sequence[3].weight.T


def plain_step(learner: Learner, number: int, buffers: dict[str, torch.Tensor]) -> torch.Tensor:
    """BYOL's step with LARS by the formulas of the papers, on the method's own modules; its loss.

    buffers: the momentum of each parameter, which is updated.
    """
    method, config = learner.method, learner.config
    first, second = (normalise(view, torch.float32).double() for view in batch(number).views)
    views = torch.cat([first, second])
    predictions = layers(layers(method.encoder.backbone(views), method.encoder.head), method.predictor)
    with torch.no_grad():
        targets = layers(method.momentum_encoder.backbone(views), method.momentum_encoder.head)
    losses = []
    for i in range(ROWS):
        for of, to in ((i, ROWS + i), (ROWS + i, i)):
            cosine = predictions[of] @ targets[to] / predictions[of].norm() / targets[to].norm()
            losses.append(2 - 2 * cosine)
    loss = torch.stack(losses).sum() / ROWS
    learned = {name: p for name, p in method.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(learned.values()))
    with torch.no_grad():
        for (name, weight), gradient in zip(learned.items(), gradients, strict=True):
            rate = config.optim.lr
            if weight.ndim > 1:
                size, decay = weight.norm(), config.optim.weight_decay
                rate = rate * config.optim.trust * size / (gradient.norm() + decay * size)
                gradient = gradient + decay * weight
            buffers[name] = config.optim.momentum * buffers.get(name, 0) + rate * gradient
            weight -= buffers[name]
        momentum = 1 - (1 - config.model.momentum) * (math.cos(math.pi * number / EPOCHS) + 1) / 2
        for ours, theirs in zip(method.momentum_encoder.parameters(), method.encoder.parameters(), strict=True):
            ours.copy_(momentum * ours + (1 - momentum) * theirs)
    return loss.detach()


def test_steps_are_those_of_the_formulas(alone):
    """In float64. The momentum grows from step to step, and the last prediction is of a target that has moved."""
    config = tiny(model__momentum=0.7, optim__weight_decay=1e-2)
    learner, other, buffers = exactly(alone, config), exactly(alone, config), {}
    for number in range(3):
        found = learner.step(batch(number), number)["loss"]
        expected = plain_step(other, number, buffers)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for (name, ours), theirs in zip(learner.method.named_parameters(), other.method.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=name)


def test_both_networks_have_the_statistics_of_both_views_together(alone):
    learner = ready(alone)
    encoder, given = copy.deepcopy(learner.method.encoder), batch()
    learner.step(given, 0)
    encoder(normalise(torch.cat(given.views), torch.float32))
    expected = [buffer for _, buffer in batch_norm_buffers(encoder)]
    for found in learner.method.encoders().values():  # at the first step they are alike
        for ours, theirs in zip([buffer for _, buffer in batch_norm_buffers(found)], expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_spread_is_that_of_the_first_view_s_features(alone):
    learner = ready(alone)
    other, given = copy.deepcopy(learner.method), batch()
    features = other.encode(other.encoder, torch.cat(given.views))[:ROWS]
    assert learner.step(given, 0)["feature_spread"].item() == pytest.approx(spread(features).item(), rel=1e-5)


def test_the_momentum_encoder_follows_after_the_update(alone):
    learner = ready(alone, tiny(model__momentum=0.0))  # so that it becomes the encoder
    before = [p.clone() for p in learner.method.momentum_encoder.parameters()]
    learner.step(batch(), 0)
    after = list(learner.method.momentum_encoder.parameters())
    assert not same(before, after)
    for ours, theirs in zip(after, learner.method.encoder.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # At the run's end it stays as it is, though the encoder goes on.
    before = [p.clone() for p in after]
    learner.step(batch(1), EPOCHS)
    assert same(before, after)


def test_a_skipped_update_moves_nothing(alone, monkeypatch):
    learner = ready(alone)
    learner.step(batch(), 0)
    before = [p.clone() for p in learner.method.parameters()]
    monkeypatch.setattr(pcl_fast.methods.byol, "byol", lambda prediction, target: prediction.sum(1) * torch.nan)
    assert learner.step(batch(1), 1)[FINITE] == 0
    assert same(before, list(learner.method.parameters()))


def test_a_captured_step_is_given_another_momentum(alone):
    """It computes again with the tensors that it was captured with."""
    one, other = ready(alone), ready(alone)
    kept = other.inputs(batch(), 0).moved(lambda packed: packed)
    for number in range(3):
        one.step(batch(number), number)
        kept.copy_(other.inputs(batch(number), number).moved(lambda packed: packed))
        other.compute(kept, 0)
    assert same(list(one.method.parameters()), list(other.method.parameters()))


def steps_of(world: World, config: Config, number_of_steps: int):
    learner = exactly(world, config)
    rows = slice(*shard_bounds(ROWS, world.rank, world.size))
    losses = [learner.step(part(batch(number), rows), number)["loss"] for number in range(number_of_steps)]
    statistics = [buffer for _, buffer in batch_norm_buffers(learner.method)]
    return torch.stack(losses), [p.detach() for p in learner.method.parameters()], statistics


def test_two_ranks_learn_what_one_learns(alone):
    """With batch norm over both, in all three networks."""
    config = tiny(model__momentum=0.7)
    (losses, weights, statistics), (other_losses, other_weights, other_statistics) = run_ranks(2, steps_of, config, 3)
    assert same([*weights, *statistics], [*other_weights, *other_statistics])
    expected_losses, expected_weights, expected_statistics = steps_of(alone, config, 3)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close((losses + other_losses) / 2, expected_losses, **close)
    for ours, theirs in zip([*weights, *statistics], [*expected_weights, *expected_statistics], strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_views_of_an_image_come_together_and_images_do_not(alone):
    learner = ready(alone, tiny(optim__lr=3.0, epochs=20))
    values = [learner.step(batch(), number) for number in range(20)]
    assert values[-1]["loss"] < 0.5 * values[0]["loss"]
    assert values[-1]["feature_spread"] > 0.1


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_collapse_is_said(alone):
    method = build(tiny(), alone, ROWS)
    assert method.warning({"feature_spread": 0.011}, 10) is None
    assert method.warning({}, 10) is None
    text = method.warning({"feature_spread": 0.001}, 10)
    assert "(cosine similarity 0.999 on average): they have collapsed" in text
    for flag in ("--optim.lr ", "--optim.weight-decay 1.5e-06", "--model.momentum 0.9"):
        assert flag in text


@pytest.mark.parametrize(
    ("sync_bn", "size", "ranks", "least"), [(True, 1, 1, 2), (False, 1, 1, 2), (False, 2, 2, 4), (False, 3, 2, 4)]
)
def test_images_by_themselves_are_refused(sync_bn, size, ranks, least):
    config = tiny(model__sync_bn=sync_bn, optim__batch_size=size)
    with pytest.raises(
        ValueError, match=rf"--optim\.batch-size {size} leaves batch norm an image.* use {least} or more"
    ):
        method_class("byol").check(config, 100, ranks)
    method_class("byol").check(tiny(model__sync_bn=True, optim__batch_size=2), 100, 2)


def test_a_run_that_has_begun_is_not_made_longer_but_by_accepting_the_jump(tmp_path):
    """Not even where its learning rates would be the same: its momentum would have been another."""
    config = tiny(output=tmp_path, optim__schedule="step", optim__milestones=())
    longer = replace(config, epochs=2 * EPOCHS)
    state = {"config": to_dict(config), "data": "images", "epoch": 0, "step": 0}
    assert check_same_run(state, longer, "images") == [f"epochs: {EPOCHS} -> {2 * EPOCHS}"]
    with pytest.raises(
        ValueError,
        match=r"a step of byol does depends on the run's length.* others with --epochs 8\. Go back to --epochs 4",
    ) as said:
        check_same_run({**state, "step": 1}, longer, "images")
    assert f"--resume-from {tmp_path / 'checkpoint.pt'} --output NEW --epochs 8" in str(said.value)
    taken_up = replace(longer, resume_from=tmp_path, output=tmp_path / "new")
    assert check_taken_up({**state, "step": 1}, taken_up, "images")[1:] == [f"epochs: {EPOCHS} -> {2 * EPOCHS}"]


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"model__queue_size": 5}, r"--model\.queue-size"),
        ({"loss__temperature": 0.3}, r"--loss\.temperature"),
        ({"cluster__ks": (5,)}, r"--cluster\.ks"),
    ],
)
def test_settings_of_other_methods_are_refused(changes, flag):
    own = r"byol, whose own settings are --model\.momentum, --model\.sync-bn"
    with pytest.raises(ValueError, match=rf"{flag} is a setting of .*, and this run's method is {own}"):
        check_method(tiny(**changes))


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory) -> tuple[Config, Path]:
    output = tmp_path_factory.mktemp("byol")
    config = tiny(
        data__root=image_folder,
        data__size=16,
        data__views="byol",
        data__loader="torchvision",
        output=output,
        epochs=2,
        log_every=1,
        optim__batch_size=12,
        evaluation__every=1,
        evaluation__neighbours=5,
        evaluation__ks=(4,),
    )
    check_method(config)
    assert run(config, World(0, 1, torch.device("cpu"), None))
    return config, output


def test_end_to_end(whole):
    rows = read_rows(whole[1])
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == 8
    assert all(set(row) == {"kind", "step", "epoch", "loss", "feature_spread", "lr"} for row in steps)
    assert all(0 < row["loss"] < 8 for row in steps)
    assert [sorted(row["ami"]) for row in rows if row["kind"] == "evaluation"] == [["4"]] * 3
    assert (whole[1] / "report.png").stat().st_size > 0


def test_evaluation_and_new_runs_read_its_checkpoint(whole, alone):
    config, output = whole
    saved, images = load_checkpoint(output), torch.randn(3, 3, 16, 16)
    trained = build(config, alone, 53)
    trained.load_state_dict(saved["method"])
    trained.eval()
    fresh = build(replace(config, seed=1), alone, 53)
    lines, _ = begin_with(output, fresh, config.model)
    assert any("momentum encoder" in line for line in lines)
    for name, encoder in trained.encoders().items():
        found = read_pretrained(output, name)
        features = encoder(images)
        torch.testing.assert_close(F.normalize(found.head(found.backbone(images)), dim=1), features)
        assert torch.equal(fresh.encoders()[name].eval()(images), features)
