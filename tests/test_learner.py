"""One optimiser step, whatever the method; PCL serves as an example."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from steps import DEMO, batch, learner_of, momenta, part, same, small_config, weights

from pcl_fast.clustering import PrototypeSet
from pcl_fast.data import Batch
from pcl_fast.learner import FINITE, Learner
from pcl_fast.methods import Inputs, build
from pcl_fast.optim import Group, learning_rate


def test_a_step_is_torch_sgd_s(alone, monkeypatch):
    """The fused optimiser with its skip flag does what plain SGD does."""
    config = small_config()
    learner, other = learner_of(config, alone), learner_of(config, alone)
    options = {"lr": config.optim.lr, "momentum": config.optim.momentum, "weight_decay": config.optim.weight_decay}
    plain = torch.optim.SGD(other.method.encoder.parameters(), **options, foreach=False)

    def descend(loss: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        plain.zero_grad()
        loss.backward()
        plain.step()
        return torch.tensor(True), torch.tensor(False)

    monkeypatch.setattr(other, "_descend", descend)
    for number in range(3):
        learner.step(batch(number), number)
        other.step(batch(number), number)
    for ours, theirs in zip(weights(learner), weights(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_touches_no_weight(alone):
    learner = learner_of(small_config(), alone)
    assert learner.step(batch(0), 0)[FINITE] == 1
    before, momentum = weights(learner), momenta(learner)
    learner.method.queue.keys[3] = torch.nan
    values = learner.step(batch(1), 1)
    assert values["loss"].isnan()
    assert values[FINITE] == 0
    assert same(before, weights(learner))
    assert same(momentum, momenta(learner))
    learner.method.queue.keys[3] = 0.5
    learner.step(batch(2), 2)
    assert not same(before, weights(learner))


def test_a_method_is_told_whether_the_update_was_applied(alone, monkeypatch):
    """With what its forward pass carried; for momentum copies and banks that must not take up what is not finite."""
    learner, told = learner_of(small_config(), alone), []
    monkeypatch.setattr(learner.method, "after_update", lambda carry, applied: told.append((carry[0].shape, applied)))
    for queued in (0.5, torch.nan, 0.5):
        learner.method.queue.keys[3] = queued
        learner.step(batch(), len(told))
    assert [shape for shape, _ in told] == [(6, 8)] * 3
    assert [applied.item() for _, applied in told] == [True, False, True]
    assert all(applied.dtype is torch.bool and applied.ndim == 0 for _, applied in told)


def test_an_infinite_loss_with_finite_gradients_touches_no_weight(alone):
    learner = learner_of(small_config(), alone)
    before = weights(learner)
    learner._descend(sum(p.sum() for p in learner.method.encoder.parameters()) + torch.inf, 0)
    assert same(before, weights(learner))


@pytest.mark.parametrize("where", [0, 7, -1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_in_any_layer_touches_no_weight(alone, where, value):
    """One entry of one layer, with a loss that is finite: the first layer's gradient is seen by no other."""
    learner = learner_of(small_config(), alone)
    learner.step(batch(0), 0)
    before, momentum = weights(learner), momenta(learner)
    parameter = list(learner.method.encoder.parameters())[where]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[(-1,) * gradient.ndim] = value
        return gradient

    hook = parameter.register_hook(spoil)
    values = learner.step(batch(1), 1)
    hook.remove()
    assert values["loss"].isfinite()
    assert values[FINITE] == 0
    assert same(before, weights(learner))
    assert same(momentum, momenta(learner))
    assert learner.step(batch(2), 2)[FINITE] == 1


def test_a_skipped_first_step_leaves_no_trace(alone):
    """The fused optimiser would otherwise go on from uninitialised momentum."""
    learner, fresh = learner_of(small_config(), alone), learner_of(small_config(), alone)
    keys = learner.method.queue.keys.clone()
    learner.method.queue.keys[3] = torch.nan
    learner.step(batch(0), 0)
    learner.method.queue.keys.copy_(keys)
    learner.method.queue.position.zero_()
    for buffer, initial in zip(learner.method.buffers(), fresh.method.buffers(), strict=True):
        buffer.copy_(initial)
    learner.step(batch(1), 1)
    fresh.step(batch(1), 1)
    for ours, theirs in zip(weights(learner), weights(fresh), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def poisoned_step(world, config, whole: Batch):
    """A step whose loss is not finite on the second rank."""
    learner = learner_of(config, world)
    if world.rank == 1:
        learner.method.queue.keys[2] = torch.nan
    before = weights(learner)
    learner.step(part(whole, slice(0, 3) if world.rank == 0 else slice(3, 6)), 0)
    return before, weights(learner), momenta(learner)


def test_a_loss_that_is_not_finite_on_one_rank_touches_no_weight_on_any():
    for before, after, momentum in run_ranks(2, poisoned_step, small_config(), batch()):
        assert same(before, after)
        assert all(not buffer.any() for buffer in momentum)


def test_what_differs_between_steps_is_in_their_inputs(alone):
    """Negatives are drawn by a seed on the device, and the learning rate lies there: a captured step can go on."""
    generator = torch.Generator().manual_seed(0)
    centroids = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    prototypes = [PrototypeSet(centroids, torch.full((50,), 0.2), torch.arange(6, dtype=torch.int32))]
    config = small_config(loss=replace(DEMO.loss, num_negatives=5))
    losses = []
    for draw, lr in ((0, 0.1), (0, 0.1), (1, 0.1), (0, 0.2)):
        learner = learner_of(config, alone, prototypes)
        learner.optimizer.param_groups[0]["lr"].fill_(lr)
        inputs = learner.inputs(batch(), 0)
        inputs = inputs._replace(drawn={**inputs.drawn, "seed": learner.inputs(batch(), draw).drawn["seed"]})
        losses.append((learner.compute(inputs, 0)["prototype_loss"].item(), weights(learner)[0]))
    (first, after), again, drawn, faster = losses
    assert again[0] == first
    assert drawn[0] != first
    before = weights(learner_of(config, alone, prototypes))[0]
    torch.testing.assert_close(faster[1] - before, 2 * (after - before), rtol=1e-3, atol=1e-6)


def test_what_is_drawn_travels_in_one_tensor():
    """A number of 63 bits, a permutation and a table come out as they went in, as tensors."""
    drawn = {"seed": 2**62 + 3, "order": torch.randperm(6), "table": torch.randint(2**40, (6, 2))}
    inputs = Inputs(batch().views, batch().index, drawn)
    moves = []

    def move(packed: torch.Tensor) -> torch.Tensor:
        moves.append(packed)
        return packed.clone()

    moved = inputs.moved(move)
    assert [packed.dtype for packed in moves] == [torch.int64]
    assert moved.views is inputs.views
    assert torch.equal(moved.index, inputs.index)
    assert (moved.drawn["seed"].shape, moved.drawn["seed"].item()) == ((), 2**62 + 3)
    assert all(torch.equal(moved.drawn[name], drawn[name]) for name in ("order", "table"))


def test_a_captured_step_s_inputs_are_overwritten_in_place():
    kept = Inputs(batch().views, batch().index.clone(), {"seed": torch.tensor(1)})
    address = kept.drawn["seed"].data_ptr()
    kept.copy_(Inputs(batch(1).views, batch(1).index + 1, {"seed": torch.tensor(7)}))
    assert (kept.drawn["seed"].item(), kept.drawn["seed"].data_ptr()) == (7, address)
    assert same([*kept.views, kept.index], [*batch(1).views, batch(1).index + 1])


def test_every_trainable_parameter_is_in_a_group(alone, monkeypatch):
    method = build(small_config(), alone, 6)
    whole = method.groups()
    monkeypatch.setattr(method, "groups", lambda: [Group(whole[0].parameters[1:])])
    with pytest.raises(ValueError, match=r"PCL.groups must have every.*not \['encoder.backbone.0.weight'\]"):
        Learner(method, small_config(), alone)


def test_generators_go_on_where_they_were(alone):
    learner = learner_of(small_config(), alone)
    own, expected = learner.own_state(), torch.rand(3)
    learner.load(learner.state(), [own])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has graphs")
def test_a_captured_step_goes_on_as_the_step_itself(alone):
    world = replace(alone, device=torch.device("cuda", 0))
    learner, captured = learner_of(small_config(), world), learner_of(small_config(), world)
    batches = [Batch(tuple(view.cuda() for view in batch(number).views), batch(number).index) for number in range(4)]
    for each in (learner, captured):  # the first steps allocate what stays, which cannot be captured
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            each.step(batches[0], 0)
        torch.cuda.current_stream().wait_stream(side)
    held, graph = captured.inputs(batches[1], 1), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.compute(held, 1)
    for number in (1, 2, 3):
        held.copy_(captured.inputs(batches[number], number))
        graph.replay()
        learner.step(batches[number], number)
    for ours, theirs in zip(weights(captured), weights(learner), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


def test_initial_weights_depend_on_the_seed_alone(alone):
    torch.rand(7)
    one = weights(learner_of(small_config(), alone))
    torch.rand(3)
    assert same(one, weights(learner_of(small_config(), alone)))
    assert not same(one, weights(learner_of(small_config(seed=1), alone)))


def test_every_epoch_trains_at_its_own_learning_rate(alone):
    learner, resumed = learner_of(small_config(), alone), learner_of(small_config(), alone)
    for epoch in (0, 7, 23):
        lr = learner.set_rate(epoch)
        assert lr == pytest.approx(learning_rate(small_config().optim, epoch, DEMO.epochs))
        assert learner.optimizer.param_groups[0]["lr"].item() == pytest.approx(lr)
    resumed.load(learner.state(), [learner.own_state()])
    resumed.set_rate(11)
    assert resumed.optimizer.param_groups[0]["lr"].item() == pytest.approx(learning_rate(DEMO.optim, 11, DEMO.epochs))


def with_scaler(learner, scale: float):
    """As in half precision, where the loss is scaled."""
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
    return learner


@pytest.mark.parametrize("saved_scaled", [True, False])
def test_a_checkpoint_of_one_precision_is_taken_up_in_another(alone, saved_scaled):
    """Scaled (fp16) and not (bf16, or a CPU), in both directions."""
    saved, resumed = learner_of(small_config(), alone), learner_of(small_config(), alone)
    with_scaler(saved if saved_scaled else resumed, 1024.0)
    saved.step(batch(0), 0)
    resumed.load(saved.state(), [saved.own_state()])
    assert same(weights(saved), weights(resumed))
    if not saved_scaled:
        assert resumed.scaler.get_scale() == 1024
    assert resumed.step(batch(1), 1)[FINITE] == 1


def test_an_overflow_of_scaled_gradients_is_no_fault_until_the_scale_is_one(alone):
    learner = with_scaler(learner_of(small_config(), alone), 4.0)
    before = weights(learner)
    hook = next(learner.method.encoder.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    found = [learner.step(batch(number), number)[FINITE].item() for number in range(3)]
    hook.remove()
    assert found == [1, 1, 0]  # at scales 4, 2 and 1
    assert same(before, weights(learner))
