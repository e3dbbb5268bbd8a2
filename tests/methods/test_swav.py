"""SwAV: whole steps against plain PyTorch in float64, the queue, two ranks against one, and what is refused;
test_every_method.py has what all methods promise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import same
from methods.every import tiny as tiny_of
from ranks import run_ranks
from torch import nn

from pcl_fast.captured import CapturedStep
from pcl_fast.clustering.prototypes import prototypes_in
from pcl_fast.config import PRESETS, Config, validate, with_settings
from pcl_fast.data import Batch, normalise
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.learner import Learner
from pcl_fast.methods import build, check_method, method_class
from pcl_fast.nn.encoder import Encoder

SwAV = method_class("swav")
# Two steps an epoch. The queue is full with the fourth step of the run, and used from the fifth on.
IMAGES, ROWS, FROZEN, QUEUED_FROM = 12, 6, 2, 4
pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**changes: Any) -> Config:
    """Two large crops of 12 px and one of 8 px."""
    settings = {
        "optim.batch_size": ROWS,
        "data.size": 12,
        "data.resize": 16,
        "swav.queue_size": 12,
        "swav.queue_epoch": 1,
        "swav.frozen_steps": FROZEN,
        "swav.small_crops": 1,
        "swav.small_size": 8,
        "optim.weight_decay": 1e-2,
    }
    return with_settings(
        tiny_of("swav"), settings | {name.replace("__", "."): value for name, value in changes.items()}
    )


def batch(number: int, sides: Sequence[int] = (12, 12, 8), rows: slice = slice(None)) -> Batch:
    """Images that differ in colour; `rows` of the whole batch."""
    generator = torch.Generator().manual_seed(number)
    colours = torch.randint(0, 200, (ROWS, 1, 1, 3), generator=generator)
    views = [colours + torch.randint(0, 56, (ROWS, side, side, 3), generator=generator) for side in sides]
    index = torch.arange(ROWS) + ROWS * (number % (IMAGES // ROWS))
    return Batch(tuple(view.to(torch.uint8)[rows] for view in views), index[rows])


def learner_of(config: Config, world: World, images: int = IMAGES) -> Learner:
    learner = Learner(build(config, world, images), config, world)
    learner.set_rate(0)
    return learner


# --- whole steps in float64 -------------------------------------------------------------------------------------------


class Exactly(SwAV, name="swav in float64"):
    """In float32 rounding decides on which side of zero some activations are."""

    settings = ()

    def encode(self, encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return encoder(normalise(images, torch.float32).double())


def exact_learner(config: Config, world: World) -> Learner:
    config = with_settings(config, {"method": Exactly.name})
    return Learner(build(config, world, IMAGES).double(), config, world)


class Plain:
    """The authors' loop as their paper and code describe it: no ranks, nothing stable, one thing after another."""

    def __init__(self, encoder: Encoder, prototypes: torch.Tensor, config: Config):
        self.encoder, self.config = encoder, config
        self.prototypes = nn.Parameter(prototypes.clone())
        self.parameters = [*encoder.parameters(), self.prototypes]
        self.momentum = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.queue: list[list[torch.Tensor]] = [[], []]  # of each large crop, the newest batch first

    def step(self, given: Batch, number: int, lr: float) -> float:
        options = self.config.swav
        with torch.no_grad():
            self.prototypes /= self.prototypes.norm(dim=1, keepdim=True)
        images = [normalise(view, torch.float32).double() for view in given.views]
        pooled = torch.cat([self.encoder.backbone(torch.cat(images[:2])), self.encoder.backbone(images[2])])
        projected = self.encoder.head(pooled)
        embeddings = (projected / projected.norm(dim=1, keepdim=True)).chunk(3)
        logarithms = [torch.log_softmax(z @ self.prototypes.T / 0.1, 1) for z in embeddings]
        loss = 0.0
        for large in range(2):
            with torch.no_grad():
                rows = [embeddings[large]]
                if number >= QUEUED_FROM:
                    rows = [*self.queue[large][:2], *rows]
                code = self._codes(torch.cat(rows) @ self.prototypes.T / options.epsilon)[-ROWS:]
                self.queue[large].insert(0, embeddings[large].clone())
            for other in {0, 1, 2} - {large}:
                loss = loss - (code * logarithms[other]).sum(1).mean() / 2 / 2
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            for parameter, momentum, gradient in zip(self.parameters, self.momentum, gradients, strict=True):
                if parameter is self.prototypes and number < FROZEN:
                    continue
                self._update(parameter, momentum, gradient, lr)
        return loss.item()

    def _codes(self, exponents: torch.Tensor) -> torch.Tensor:
        q = exponents.exp().T
        for _ in range(self.config.swav.iterations):
            q = q / q.sum(1, keepdim=True) / q.shape[0]
            q = q / q.sum(0, keepdim=True) / q.shape[1]
        return (q / q.sum(0, keepdim=True)).T

    def _update(self, parameter: torch.Tensor, momentum: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        optim = self.config.optim
        weight, size = parameter.norm(), gradient.norm()
        if weight > 0 and size > 0:
            ratio = optim.trust * weight / (size + optim.weight_decay * weight + 1e-8)
            gradient = ratio * (gradient + optim.weight_decay * parameter)
        momentum.mul_(optim.momentum).add_(gradient)
        parameter.sub_(lr * momentum)


CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def test_steps_are_those_of_plain_pytorch(alone):
    """Through all phases: frozen prototypes, free ones, and the queue in use."""
    config = tiny()
    learner = exact_learner(config, alone)
    method = learner.method
    plain = Plain(copy.deepcopy(method.encoder), method.prototypes.weight.detach(), config)
    for number in range(QUEUED_FROM + 3):
        lr = learner.set_rate(number)
        loss = learner.step(batch(number), number)["loss"].item()
        assert loss == pytest.approx(plain.step(batch(number), number, lr), rel=1e-8), number
        for ours, theirs in zip(method.parameters(), plain.parameters, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, number=number: f"{number}: {text}")


def steps_of(world: World, config: Config, number_of_steps: int) -> tuple:
    learner = exact_learner(config, world)
    rows = slice(*shard_bounds(ROWS, world.rank, world.size))
    losses = []
    for number in range(number_of_steps):
        learner.set_rate(number)
        losses.append(learner.step(batch(number, rows=rows), number)["loss"])
    buffers = [buffer for name, buffer in learner.method.named_buffers() if "queue" not in name]
    return torch.stack(losses), [*(p.detach() for p in learner.method.parameters()), *buffers], learner.method.queue


def test_two_ranks_learn_what_one_learns(alone):
    """With batch norm and codes over both, and the queue split between them."""
    config, steps = tiny(), QUEUED_FROM + 3
    (losses, state, queue), (other_losses, other_state, other_queue) = run_ranks(2, steps_of, config, steps)
    same(state, other_state, "state")
    expected_losses, expected_state, expected_queue = steps_of(alone, config, steps)
    torch.testing.assert_close((losses + other_losses) / 2, expected_losses, **CLOSE)
    for ours, theirs in zip(state, expected_state, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), **CLOSE)
    batches = zip(queue.split(3, dim=1), other_queue.split(3, dim=1), strict=True)
    together = torch.cat([part for pair in batches for part in pair], dim=1)
    torch.testing.assert_close(together, expected_queue, **CLOSE)


# --- prototypes and phases --------------------------------------------------------------------------------------------


def test_prototypes_are_frozen_at_first_and_of_unit_length(alone):
    learner = learner_of(tiny(), alone)
    weight = learner.method.prototypes.weight
    begin = F.normalize(weight.detach(), dim=1)
    for number in range(FROZEN + 1):
        learner.step(batch(number), number)
        assert torch.allclose(weight, begin, atol=1e-6) == (number < FROZEN)
        learner.method(learner.inputs(batch(number), number))
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(7))
    assert learner.optimizer.state[weight]["momentum_buffer"].any()


class Graphs:
    """What stands in for CUDA graphs, see test_captured.py: the captured work is done again."""

    def __init__(self, learner: Learner):
        self.learner, self.count = learner, 0

    def __call__(self, work, device):
        self.count += 1
        before = copy.deepcopy((self.learner.state(), [self.learner.own_state()]))
        result = work()
        self.learner.load(*before)
        return lambda: result.copy_(work()), result


def test_captured_steps_go_through_all_phases(alone, monkeypatch):
    """A step is captured anew when prototypes are no longer frozen, and when the queue comes into use."""
    config = tiny(swav__frozen_steps=5, swav__queue_epoch=4)  # used from step 10 on
    one, other = learner_of(config, alone), learner_of(config, alone)
    inputs = other.inputs
    monkeypatch.setattr(other, "inputs", lambda *given: inputs(*given).moved(lambda packed: packed))
    graphs = Graphs(other)
    captured = CapturedStep(other, graphs)
    for number in range(15):
        expected, found = one.step(batch(number), number), captured.step(batch(number), number)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.float(), msg=f"{name} of step {number}")
    assert graphs.count == 3
    same(other.state(), one.state(), "state")
    assert torch.equal(other.method.queue, one.method.queue)


# --- the queue --------------------------------------------------------------------------------------------------------


def test_the_queue_is_not_seen_before_it_is_used_and_without_one_never(alone):
    losses = []
    for size in (12, 0):
        learner = learner_of(tiny(swav__queue_size=size), alone)
        losses.append([learner.step(batch(number), number)["loss"].item() for number in range(QUEUED_FROM + 1)])
    assert losses[0][:QUEUED_FROM] == losses[1][:QUEUED_FROM]
    assert losses[0][QUEUED_FROM] != losses[1][QUEUED_FROM]


def test_the_queue_is_one_rank_s_own_and_no_part_of_the_shared_state(alone):
    learner = learner_of(tiny(), alone)
    learner.step(batch(0), 0)
    assert "queue" not in learner.method.state_dict()
    newest, older = learner.method.own_state()["queue"].split(ROWS, dim=1)
    torch.testing.assert_close(newest.norm(dim=2), torch.ones(2, ROWS))
    assert not older.any()


def of_ranks(size: int, config: Config) -> list[nn.Module]:
    return [build(config, World(rank, size, torch.device("cpu"), None), IMAGES) for rank in range(size)]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1), (2, 3), (3, 2), (2, 2)])
def test_another_number_of_ranks_shares_the_queue_by_age(before, after):
    """Every number is the age of an embedding in batches of as many as there are ranks; none is lost."""
    config = tiny(model__sync_bn=False)
    saved = of_ranks(before, config)
    for rank, method in enumerate(saved):
        age = torch.arange(12 // before).float() + rank / 10
        method.queue.copy_(age[None, :, None].expand_as(method.queue))
    states, taken = [method.own_state() for method in saved], of_ranks(after, config)
    for method in taken:
        method.load_own(states)
    everything = torch.stack([method.queue[1, :, 0] for method in taken], dim=1).flatten()
    expected = torch.stack([method.queue[1, :, 0] for method in saved], dim=1).flatten()
    assert torch.equal(everything, expected)
    assert torch.equal(expected, expected.sort().values)


def test_a_queue_of_another_size_is_refused_in_words():
    (saved,), (other,) = of_ranks(1, tiny()), of_ranks(1, tiny(swav__queue_size=24))
    with pytest.raises(ValueError, match=r"queue has 12 embeddings of 8 .* 1 ranks with --swav\.queue-size 24 take 24"):
        other.load_own([saved.own_state()])


def test_a_queue_that_is_never_used_is_said(alone):
    assert build(tiny(), alone, IMAGES).notes() == []
    (note,) = build(tiny(swav__queue_epoch=100), alone, IMAGES).notes()
    assert note.startswith("the queue is never used: it is full at step 202, and the run has 48")


# --- recipe, learning, and what is refused ----------------------------------------------------------------------------


def test_the_preset_is_the_published_recipe(alone):
    config = PRESETS["swav"][1]
    assert (config.epochs, config.optim.batch_size, config.loss.temperature) == (200, 256, 0.1)
    optim, options = config.optim, config.swav
    assert (optim.optimizer, optim.lr, optim.lr * optim.final_share) == ("larc", 0.6, pytest.approx(6e-4))
    assert (optim.trust, optim.weight_decay, optim.warmup_epochs, optim.schedule) == (0.001, 1e-6, 0, "cosine")
    assert (options.prototypes, options.epsilon, options.iterations, options.frozen_steps) == (3000, 0.05, 3, 5005)
    assert (options.queue_size, options.queue_epoch) == (3840, 15)
    assert (config.model.head, config.model.dim, config.model.sync_bn) == ("mlp_inner_bn", 128, True)
    method = build(with_settings(config, {"model.arch": "cifar_resnet8"}), alone, 1_281_167)
    assert method._queued_from == 15 * 5004 + 15
    large, small = method.views[0], method.views[2]
    assert method.views == (large,) * 2 + (small,) * 6
    assert (large.size, large.min_area, large.max_area) == (224, 0.14, 1.0)
    assert (small.size, small.min_area, small.max_area) == (96, 0.05, 0.14)
    assert {view.jitter for view in method.views} == {(0.8, 0.8, 0.8, 0.2)}
    (group,) = method.groups()
    assert (group.decay, group.adapt) == (True, True)


def test_crops_of_an_image_come_together(alone):
    config = tiny(swav__queue_size=0, swav__small_crops=0)
    learner = learner_of(config, alone)
    given = batch(0, (12, 12))
    values = [learner.step(given, number) for number in range(30)]
    assert values[-1]["loss"] < 0.8 * values[0]["loss"]
    assert values[-1]["accuracy"] > 80
    assert learner.method.warning({name: value.item() for name, value in values[-1].items()}, 30) is None


def test_a_collapse_is_warned_about(alone):
    learner = learner_of(tiny(), alone)
    with torch.no_grad():
        learner.method.encoder.head[-1].weight.mul_(1e-6)
    spread = learner.step(batch(0), 0)["spread"].item()
    assert spread < 1e-3
    assert "they have collapsed" in learner.method.warning({"spread": spread}, 1)
    assert "--optim.lr" in learner.method.warning({"spread": spread}, 1)


def test_there_are_no_prototypes_to_show_as_clusters(alone):
    assert prototypes_in(build(tiny(), alone, IMAGES).state_dict()) == ()


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"swav__prototypes": 13}, 1, r"--swav\.prototypes 13: .* of the 12 images; use 2 to 12"),
        ({"swav__prototypes": 1}, 1, r"--swav\.prototypes 1: .* use 2 to 12"),
        ({"swav__queue_size": 13}, 2, r"--swav\.queue-size 13 does not divide among 2 ranks"),
        (
            {"swav__queue_size": 4},
            2,
            r"--swav\.queue-size 4 is smaller than --optim\.batch-size 6; use 6 or more, or 0",
        ),
        ({"swav__small_areas": (0.2, 0.1)}, 1, r"--swav\.small-areas 0\.2 0\.1"),
        ({"swav__small_size": 13}, 1, r"--swav\.small-size 13: .* --data\.size 12"),
        ({"optim__batch_size": 1}, 1, r"--optim\.batch-size 1 leaves nothing to be told apart"),
    ],
)
def test_what_cannot_work_is_refused(changes, ranks, message):
    with pytest.raises(ValueError, match=message):
        SwAV.check(tiny(**changes), IMAGES, ranks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swav__epsilon": 0.0}, r"--swav\.epsilon must be positive, got 0\.0"),
        ({"swav__iterations": 0}, r"--swav\.iterations must be positive, got 0"),
        ({"swav__prototypes": -3}, r"--swav\.prototypes must be positive, got -3"),
        ({"swav__queue_size": -1}, r"--swav\.queue-size must not be negative, got -1"),
        ({"swav__queue_epoch": -1}, r"--swav\.queue-epoch must not be negative, got -1"),
        ({"swav__frozen_steps": -1}, r"--swav\.frozen-steps must not be negative, got -1"),
        ({"swav__small_crops": -1}, r"--swav\.small-crops must not be negative, got -1"),
        ({"swav__small_size": 0}, r"--swav\.small-size must be positive, got 0"),
        ({"optim__final_share": 1.5}, r"--optim\.final-share is a share of the learning rate from 0 to 1, got 1\.5"),
    ],
)
def test_values_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(tiny(**changes))


def test_other_methods_do_not_take_its_settings():
    with pytest.raises(ValueError, match=r"--swav\.prototypes is a setting of [\w, ]*swav"):
        check_method(with_settings(PRESETS["simclr"][1], {"swav.prototypes": 10}))
