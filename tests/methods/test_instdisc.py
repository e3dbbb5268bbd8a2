"""InstDisc's own decisions: its bank, its noise, its constant Z. Whole runs are in test_all.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from launches import same
from ranks import run_ranks
from steps import batch, part

from pcl_fast.augmentations import AUGMENTATIONS
from pcl_fast.config import PRESETS, Config, with_settings
from pcl_fast.data import Batch, normalise
from pcl_fast.demo import small
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.learner import Learner
from pcl_fast.losses import nce
from pcl_fast.methods import build, method_class
from pcl_fast.nn.sync_batch_norm import sync_batch_norm

IMAGES, ROWS = 40, 6
pytestmark = pytest.mark.usefixtures("one_thread")
InstDisc = method_class("instdisc")


def tiny(**changes) -> Config:
    usual = {"model.dim": 8, "optim.batch_size": ROWS, "optim.lr": 0.03, "loss.num_negatives": 16}
    return with_settings(small("instdisc"), usual | {name.replace("__", "."): value for name, value in changes.items()})


def learner_of(config: Config, world: World, images: int = IMAGES) -> Learner:
    learner = Learner(build(config, world, images), config, world)
    learner.set_rate(0)
    return learner


def one_view(number: int = 0) -> Batch:
    """Other images of the data set in every step."""
    whole = batch(number)
    return Batch(whole.views[:1], (7 * number + torch.arange(ROWS)) % IMAGES)


def test_the_preset_is_the_published_recipe(alone):
    config = PRESETS["instdisc"][1]
    assert (config.epochs, config.optim.batch_size, config.optim.optimizer, config.optim.lr) == (200, 256, "sgd", 0.03)
    assert (config.optim.momentum, config.optim.weight_decay, config.optim.schedule) == (0.9, 1e-4, "step")
    assert (config.loss.temperature, config.loss.num_negatives, config.model.bank_momentum) == (0.07, 4096, 0.5)
    assert (config.model.arch, config.model.head, config.model.dim) == ("resnet50", "linear", 128)
    (view,) = build(replace(config, model=tiny().model), alone, 6).views
    assert view == replace(AUGMENTATIONS["v1"], size=224, min_area=0.2)
    assert (view.jitter, view.jitter_share, view.grey_share, view.flip_share) == ((0.4,) * 4, 1.0, 0.2, 0.5)


def test_the_bank_begins_with_random_unit_vectors_of_the_seed(alone):
    banks = [build(replace(tiny(), seed=seed), alone, IMAGES).bank.keys for seed in (0, 0, 1)]
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])
    torch.testing.assert_close(banks[0].norm(dim=1), torch.ones(IMAGES))
    other = build(replace(tiny(), seed=0), alone, 4000).bank.keys
    assert other.mean(0).abs().max() < 0.03
    torch.testing.assert_close(other.T @ other / 4000, torch.eye(8) / 8, rtol=0, atol=0.02)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_bank_s_rows_of_the_batch_move_and_no_others(alone, momentum):
    learner = learner_of(tiny(model__bank_momentum=momentum), alone)
    given, before = one_view(3), learner.method.bank.keys.clone()
    twin = build(learner.config, alone, IMAGES)
    features = twin.encode(twin.encoder, given.views[0]).detach()
    learner.step(given, 0)
    expected = before.clone()
    expected[given.index] = F.normalize(momentum * before[given.index] + (1 - momentum) * features, dim=1)
    torch.testing.assert_close(learner.method.bank.keys, expected)
    assert (expected - before).abs().amax(1).gt(1e-3).sum() == ROWS


def test_the_loss_is_nce_against_the_bank_before_its_update(alone):
    """And the first step's own Z, which all later steps have."""
    learner, twin = learner_of(tiny(), alone), build(tiny(), alone, IMAGES)
    inputs = learner.inputs(one_view(), 0)
    noise = twin.bank.keys[learner.method._noise(inputs)]
    features = twin.encode(twin.encoder, inputs.views[0])
    partition = IMAGES * (features @ noise.T / 0.07).exp().mean()
    own = twin.bank.keys[inputs.index]
    expected = nce(features, own, noise, 0.07, images=IMAGES, log_partition=partition.detach().log()).mean()
    values = learner.compute(inputs, 0)
    torch.testing.assert_close(values["loss"], expected.detach())
    torch.testing.assert_close(values["similarity"], (features * own).sum(1).mean().detach())
    found = learner.method.log_partition.clone()
    torch.testing.assert_close(found.exp(), partition.detach())
    for number in range(1, 4):
        learner.step(one_view(number), number)
    assert torch.equal(learner.method.log_partition, found)


def test_z_is_not_estimated_anew_where_a_run_goes_on(alone):
    learner, other = learner_of(tiny(), alone), learner_of(replace(tiny(), seed=5), alone)
    assert learner.method.phase(0) is False
    learner.step(one_view(), 0)
    assert learner.method.phase(1) is True
    assert other.method.phase(1) is False
    other.load(learner.state(), [learner.own_state()])
    other.step(one_view(1), 1)
    assert torch.equal(other.method.log_partition, learner.method.log_partition)
    # What was saved before the first step has none.
    fresh = learner_of(tiny(), alone)
    learner.load(fresh.state(), [fresh.own_state()])
    assert not learner.method.estimated


def test_noise_is_uniform_distinct_and_other_in_every_step_and_on_every_rank(alone):
    """The images of the batch are among it, as often as others."""
    method, counts = build(tiny(), alone, IMAGES), torch.zeros(IMAGES)
    learner, nothing = Learner(method, method.config, alone), Batch((), torch.arange(ROWS))

    def noise(number: int, rank: int = 0) -> torch.Tensor:
        method.world = replace(alone, rank=rank)
        return method._noise(learner.inputs(nothing, number))

    for number in range(400):
        drawn = noise(number)
        assert len(drawn.unique()) == 16
        counts[drawn] += 1
    # Of 400 draws of 16 out of 40: 160 each, with a deviation of 9.8.
    assert (counts - 160).abs().max() < 5 * 9.8
    assert (counts[:ROWS].mean() - 160).abs() < 5 * 9.8 / math.sqrt(ROWS)
    assert not torch.equal(noise(0).sort().values, noise(0, rank=1).sort().values)
    assert torch.equal(noise(7), noise(7))


def test_all_images_can_be_noise(alone):
    learner = learner_of(tiny(loss__num_negatives=IMAGES), alone)
    inputs = learner.inputs(one_view(), 0)
    assert learner.method._noise(inputs).sort().values.tolist() == list(range(IMAGES))


def test_without_a_number_of_negatives_the_loss_is_a_softmax_over_all(alone):
    learner, twin = learner_of(tiny(loss__num_negatives=None), alone), build(tiny(), alone, IMAGES)
    inputs = learner.inputs(one_view(), 0)
    features = twin.encode(twin.encoder, inputs.views[0]).double()
    expected = F.cross_entropy(features @ twin.bank.keys.double().T / 0.07, inputs.index)
    values = learner.compute(inputs, 0)
    torch.testing.assert_close(values["loss"].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    own = (features * twin.bank.keys[inputs.index]).sum(1).mean()
    torch.testing.assert_close(values["similarity"].double(), own.detach(), rtol=1e-5, atol=1e-6)
    assert learner.method.phase(1) == learner.method.phase(0)  # there is no Z to estimate


@pytest.mark.parametrize(("negatives", "lr"), [(ROWS, 0.1), (None, 0.003)])
def test_images_are_told_from_each_other(alone, negatives, lr):
    """At first a new encoder makes the same of all, and so does the bank; noise drives them apart."""
    learner = learner_of(tiny(optim__lr=lr, loss__num_negatives=negatives), alone, ROWS)
    cosines = []
    for number in range(40):
        similarity = learner.step(one_view(), number)["similarity"]
        bank = learner.method.bank.keys
        cosines.append((bank @ bank.T)[~torch.eye(ROWS, dtype=torch.bool)].mean().item())
    assert max(cosines) > 0.65
    assert cosines[-1] < 0.6
    assert similarity > 0.9


# --- two ranks against one --------------------------------------------------------------------------------------------


class Exactly(InstDisc, name="instdisc in float64"):
    """In float32 rounding decides on which side of zero some activations are. Batch norm is over all ranks' images."""

    settings = ()

    def __init__(self, config: Config, world: World, images: int):
        super().__init__(config, world, images)
        sync_batch_norm(self.encoder, world.group)

    def encode(self, encoder: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        backbone = encoder.backbone(normalise(images, torch.float32).double())
        return F.normalize(encoder.head(backbone), dim=1)


def steps_of(world: World, config: Config) -> dict[str, torch.Tensor]:
    """What is learned in four steps; the images of the last are those of the first."""
    learner = Learner(build(replace(config, method=Exactly.name), world, IMAGES).double(), config, world)
    learner.set_rate(0)
    rows = slice(*shard_bounds(ROWS, world.rank, world.size))
    for number in (0, 1, 2, 3):
        learner.step(part(one_view(number % 3), rows), number)
    return {name: value for name, value in learner.method.state_dict().items() if name != "_extra_state"}


@pytest.mark.parametrize("negatives", [IMAGES, None])
def test_two_ranks_learn_what_one_learns(alone, negatives):
    """Where all images are noise, for else every rank draws its own: weights, bank and Z."""
    config = tiny(loss__num_negatives=negatives)
    one, other = run_ranks(2, steps_of, config)
    same(one, other, "ranks")
    expected = steps_of(alone, config)
    for name, value in expected.items():
        torch.testing.assert_close(one[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def three_steps(world: World) -> dict[str, torch.Tensor]:
    learner = learner_of(tiny(), world)
    rows = slice(*shard_bounds(ROWS, world.rank, world.size))
    for number in range(3):
        learner.step(part(one_view(number), rows), number)
    return learner.method.state_dict()


def test_all_ranks_have_the_same_bank_z_and_weights():
    """To the bit, with noise of their own."""
    one, other = run_ranks(2, three_steps)
    names = [name for name in one if not name.endswith(("running_mean", "running_var"))]
    assert {"bank.keys", "log_partition"} < set(names)
    same({name: one[name] for name in names}, {name: other[name] for name in names}, "ranks")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss__num_negatives": 101},
            r"--loss\.num-negatives 101 is more than the 100 images .* use at most 100, or None for a softmax over all",
        ),
        ({"model__bank_momentum": 1.0}, r"--model\.bank-momentum 1\.0: .* use 0\.5"),
        ({"model__bank_momentum": -0.1}, r"--model\.bank-momentum -0\.1"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        InstDisc.check(tiny(**changes), 100, 1)
    InstDisc.check(tiny(loss__num_negatives=100, model__bank_momentum=0.0), 100, 1)
    InstDisc.check(tiny(loss__num_negatives=None), 100, 1)
