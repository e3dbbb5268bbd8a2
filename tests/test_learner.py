"""One M-step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from ranks import run_ranks

from pcl_fast.clustering import PrototypeSet
from pcl_fast.config import PRESETS, OptimConfig
from pcl_fast.data import Batch
from pcl_fast.learner import Learner, learning_rate

replace = dataclasses.replace
DEMO = PRESETS["demo"][1]


def small_config(**changes):
    config = replace(
        DEMO,
        model=replace(DEMO.model, queue_size=12, dim=8, arch="cifar_resnet8"),
        optim=replace(DEMO.optim, batch_size=6),
    )
    return replace(config, **changes)


def batch(seed: int = 0, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2, rows, 3, 12, 12, generator=generator)
    return Batch(views[0], views[1], torch.arange(rows))


def weights(learner: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.encoder.parameters()]


def test_order_within_a_step(alone, monkeypatch):
    """The momentum encoder moves before the keys are computed; the loss sees the queue without this batch's keys."""
    learner = Learner(small_config(), alone)
    with torch.no_grad():
        for p in learner.encoder.parameters():
            p.add_(0.01)
    queue_before = learner.queue.keys.clone()
    moved = [
        torch.lerp(k, q, 1 - learner.twin.momentum)
        for k, q in zip(learner.twin.key.parameters(), learner.encoder.parameters(), strict=True)
    ]
    seen = {}

    def spy(query, key, queue, *args, **kwargs):
        seen.update(key=key.clone(), queue=queue.clone(), twin=[p.clone() for p in learner.twin.key.parameters()])
        return original(query, key, queue, *args, **kwargs)

    import pcl_fast.learner as module

    original = module.protonce
    monkeypatch.setattr(module, "protonce", spy)
    learner.step(batch(), [], 0)
    assert torch.equal(seen["queue"], queue_before)
    for ours, expected in zip(seen["twin"], moved, strict=True):
        torch.testing.assert_close(ours, expected)
    assert torch.equal(learner.queue.keys[:6], seen["key"])
    assert torch.equal(learner.queue.keys[6:], queue_before[6:])


def test_training_pulls_images_to_their_prototypes(alone):
    generator = torch.Generator().manual_seed(0)
    centroids = torch.nn.functional.normalize(torch.randn(9, 8, generator=generator), dim=1)
    prototypes = [PrototypeSet(centroids, torch.full((9,), 0.2), torch.arange(6, dtype=torch.int32))]
    learner = Learner(small_config(), alone)
    losses = [learner.step(batch(), prototypes, number)["prototype_loss"].item() for number in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_is_torch_sgd_s(alone, monkeypatch):
    """The fused optimiser with its skip flag does what plain SGD does."""
    config = small_config()
    learner, twin = Learner(config, alone), Learner(config, alone)
    options = {"lr": config.optim.lr, "momentum": config.optim.momentum, "weight_decay": config.optim.weight_decay}
    plain = torch.optim.SGD(twin.encoder.parameters(), **options, foreach=False)

    def descend(loss: torch.Tensor) -> None:
        plain.zero_grad()
        loss.backward()
        plain.step()

    monkeypatch.setattr(twin, "_descend", descend)
    for number in range(3):
        learner.step(batch(number), [], number)
        twin.step(batch(number), [], number)
    for ours, theirs in zip(weights(learner), weights(twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_touches_no_weight(alone):
    learner = Learner(small_config(), alone)
    learner.step(batch(0), [], 0)
    before = weights(learner)
    momentum = [s["momentum_buffer"].clone() for s in learner.optimizer.state.values()]
    learner.queue.keys[3] = torch.nan
    values = learner.step(batch(1), [], 1)
    assert values["loss"].isnan()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(learner), strict=True))
    after = [s["momentum_buffer"] for s in learner.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, after, strict=True))
    learner.queue.keys[3] = 0.5
    learner.step(batch(2), [], 2)
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(learner), strict=True))


def test_an_infinite_loss_with_finite_gradients_touches_no_weight(alone):
    learner = Learner(small_config(), alone)
    before = weights(learner)
    learner._descend(sum(p.sum() for p in learner.encoder.parameters()) + torch.inf)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(learner), strict=True))


def test_a_skipped_first_step_leaves_no_trace(alone):
    """The fused optimiser would otherwise go on from uninitialised momentum."""
    learner, fresh = Learner(small_config(), alone), Learner(small_config(), alone)
    keys = learner.queue.keys.clone()
    learner.queue.keys[3] = torch.nan
    learner.step(batch(0), [], 0)
    learner.queue.keys.copy_(keys)
    learner.queue.position.zero_()
    for buffer, initial in zip(learner._buffers(), fresh._buffers(), strict=True):
        buffer.copy_(initial)
    learner.step(batch(1), [], 1)
    fresh.step(batch(1), [], 1)
    for ours, theirs in zip(weights(learner), weights(fresh), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def one_step(world, config, whole: Batch, poisoned: bool):
    """A step on this rank's half of a batch, the key encoder in eval mode so that a key depends on its image alone."""
    learner = Learner(config, world)
    if world.rank == 1 and poisoned:
        learner.queue.keys[2] = torch.nan
    rows = slice(0, 3) if world.rank == 0 else slice(3, 6)
    learner.twin.key.eval()
    before = weights(learner)
    learner.step(Batch(*(part[rows] for part in whole)), [], 0)
    momentum = [state["momentum_buffer"].clone() for state in learner.optimizer.state.values()]
    return before, weights(learner), momentum, learner.queue.keys.clone()


def test_ranks_take_the_same_step_and_queue_all_keys_in_order(alone):
    config, whole = small_config(), batch()
    (before, one, momentum, queue), (_, other, other_momentum, other_queue) = run_ranks(
        2, one_step, config, whole, False
    )
    for mine, theirs in zip([*one, *momentum, queue], [*other, *other_momentum, other_queue], strict=True):
        assert torch.equal(mine, theirs)
    assert not all(torch.equal(a, b) for a, b in zip(before, one, strict=True))
    keys = Learner(config, alone).twin.key.eval()(whole.key_view)
    torch.testing.assert_close(queue[:6], keys, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_on_one_rank_touches_no_weight_on_any():
    for before, after, momentum, _ in run_ranks(2, one_step, small_config(), batch(), True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(not buffer.any() for buffer in momentum)


def test_initial_weights_depend_on_the_seed_alone(alone):
    torch.rand(7)
    one = weights(Learner(small_config(), alone))
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(one, weights(Learner(small_config(), alone)), strict=True))
    other = weights(Learner(small_config(seed=1), alone))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (OptimConfig(lr=0.03), {0: 0.03, 119: 0.03, 120: 0.003, 159: 0.003, 160: 0.0003, 199: 0.0003}),
        (
            OptimConfig(lr=0.03, schedule="cosine"),
            {0: 0.03, 50: 0.015 * (1 + math.sqrt(0.5)), 100: 0.015, 199: 0.015 * (1 - math.cos(math.pi / 200))},
        ),
    ],
)
def test_learning_rate_schedules(optim, expected):
    for epoch, value in expected.items():
        assert learning_rate(optim, epoch, 200) == pytest.approx(value)
