"""One M-step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ranks import run_ranks

from pcl_fast.clustering import PrototypeSet
from pcl_fast.config import PRESETS
from pcl_fast.data import Batch, normalise
from pcl_fast.distributed import shard_bounds
from pcl_fast.learner import Learner
from pcl_fast.optim import learning_rate

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
    views = torch.randint(0, 256, (2, rows, 12, 12, 3), generator=generator, dtype=torch.uint8)
    return Batch(tuple(views), torch.arange(rows))


def rows_of(whole: Batch, rows: slice, roll: int = 0) -> Batch:
    """Some rows of a batch that has been rolled."""
    views = tuple(view.roll(roll, 0)[rows] for view in whole.views)
    return Batch(views, whole.index.roll(roll, 0)[rows])


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
    learner.step(rows_of(whole, rows), [], 0)
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
    keys = Learner(config, alone).twin.key.eval()(normalise(whole.views[1], torch.float32))
    torch.testing.assert_close(queue[:6], keys, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_on_one_rank_touches_no_weight_on_any():
    for before, after, momentum, _ in run_ranks(2, one_step, small_config(), batch(), True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(not buffer.any() for buffer in momentum)


def steps_of(world, config, whole: Batch, number_of_steps: int):
    learner = Learner(config, world)
    rows = slice(*shard_bounds(len(whole.index), world.rank, world.size))
    for number in range(number_of_steps):
        learner.step(rows_of(whole, rows, number), [], number)
    learner.end_epoch()
    statistics = [buffer for buffer in learner._buffers() if buffer.is_floating_point()]
    return weights(learner), statistics, learner.queue.keys


def test_parts_of_one_rank_s_batch_train_like_so_many_ranks(alone):
    """Unshuffled, for ranks and parts do not draw the same permutations."""
    config = small_config(model=replace(small_config().model, shuffle_bn=False))
    split = replace(config, model=replace(config.model, bn_splits=2))
    whole = batch(rows=6)
    expected = run_ranks(2, steps_of, config, whole, 3)[0]
    for ours, theirs in zip(steps_of(alone, split, whole, 3), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    undivided = steps_of(alone, config, whole, 3)[0]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(undivided, expected[0], strict=True))


def test_keys_are_shuffled_among_the_parts_of_a_batch(alone):
    """Else a key would be normalised with its query's part."""
    config = small_config(model=replace(small_config().model, bn_splits=2))
    unshuffled = replace(config, model=replace(config.model, shuffle_bn=False))
    shuffled, other = (steps_of(alone, each, batch(rows=6), 1)[2] for each in (config, unshuffled))
    assert (shuffled[:6] - other[:6]).abs().max() > 1e-3


def test_what_differs_between_steps_is_in_their_inputs(alone):
    """Negatives are drawn by a seed on the device, and the learning rate lies there: a captured step can go on."""
    generator = torch.Generator().manual_seed(0)
    centroids = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    prototypes = [PrototypeSet(centroids, torch.full((50,), 0.2), torch.arange(6, dtype=torch.int32))]
    config = small_config(loss=replace(DEMO.loss, num_negatives=5))
    losses = []
    for draw, lr in ((0, 0.1), (0, 0.1), (1, 0.1), (0, 0.2)):
        learner = Learner(config, alone)
        learner._lr.fill_(lr)
        inputs = learner.inputs(batch(), 0)._replace(seed=learner.inputs(batch(), draw).seed)
        losses.append((learner.compute(inputs, prototypes)["prototype_loss"].item(), weights(learner)[0]))
    (first, after), again, drawn, faster = losses
    assert again[0] == first
    assert drawn[0] != first
    before = weights(Learner(config, alone))[0]
    torch.testing.assert_close(faster[1] - before, 2 * (after - before), rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has graphs")
def test_a_captured_step_goes_on_as_the_step_itself(alone):
    world = replace(alone, device=torch.device("cuda", 0))
    learner, captured = Learner(small_config(), world), Learner(small_config(), world)
    batches = [Batch(tuple(view.cuda() for view in batch(number).views), batch(number).index) for number in range(4)]
    for each in (learner, captured):  # the first steps allocate what stays, which cannot be captured
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            each.step(batches[0], [], 0)
        torch.cuda.current_stream().wait_stream(side)
    held, graph = captured.inputs(batches[1], 1), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.compute(held, [])
    for number in (1, 2, 3):
        for ours, new in zip(held, captured.inputs(batches[number], number), strict=True):
            if ours is not None:
                ours.copy_(new)
        graph.replay()
        learner.step(batches[number], [], number)
    for ours, theirs in zip(weights(captured), weights(learner), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


def test_features_are_the_momentum_encoder_s_in_eval_mode(alone):
    learner = Learner(small_config(), alone)
    learner.step(batch(), [], 0)
    images = batch(rows=4).views[0]
    found = learner.feature_encoder()(images)
    assert learner.twin.key.training
    expected = learner.twin.key.eval()(normalise(images, torch.float32))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_initial_weights_depend_on_the_seed_alone(alone):
    torch.rand(7)
    one = weights(Learner(small_config(), alone))
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(one, weights(Learner(small_config(), alone)), strict=True))
    other = weights(Learner(small_config(seed=1), alone))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_epoch_trains_at_its_own_learning_rate(alone):
    learner, resumed = Learner(small_config(), alone), Learner(small_config(), alone)
    for epoch in (0, 7, 23):
        lr = learner.begin_epoch(epoch)
        assert lr == pytest.approx(learning_rate(small_config().optim, epoch, DEMO.epochs))
        assert learner.optimizer.param_groups[0]["lr"].item() == pytest.approx(lr)
    resumed.load(learner.state(), learner.rank_state())
    resumed.begin_epoch(11)
    assert resumed.optimizer.param_groups[0]["lr"].item() == pytest.approx(learning_rate(DEMO.optim, 11, DEMO.epochs))
