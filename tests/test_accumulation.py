"""A step in parts learns what the step as a whole learns, but for batch norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launches import same, same_rows, same_state
from methods.every import METHODS, tiny
from methods.test_every_method import EPOCHS, IMAGES, ROWS, SIGNALLED, STEPS, recipe, train, views_of
from ranks import run_ranks
from steps import batch, part, small_config

from pcl_fast.config import PRESETS, Config, recipe_differences, to_dict, validate
from pcl_fast.data import normalise
from pcl_fast.distributed import World, shard_bounds
from pcl_fast.learner import FINITE, Learner
from pcl_fast.methods import Method, build, check_method, join_rows, method_class
from pcl_fast.nn.batch_norm import batch_norm_buffers
from pcl_fast.nn.encoder import Encoder
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import read_rows
from pcl_fast.schedule import check_sizes

pytestmark = pytest.mark.usefixtures("one_thread")
ABLE = [name for name in METHODS if method_class(name).accumulation is not None]
COMPARING = [name for name in ABLE if method_class(name).accumulation == "compare"]
every_method = pytest.mark.parametrize("name", ABLE)


def config_of(name: str, parts: int) -> Config:
    """With more prototypes than a batch has images, so that it matters which of them are nobody's."""
    config = tiny(name, optim__accumulate=parts)
    if name == "pcl":
        config = replace(config, cluster=replace(config.cluster, ks=(20, 31)))
    validate(config)
    check_method(config)
    return config


def learner_of(config: Config, world: World) -> Learner:
    """In float64, after the first E-step if the method has any; what a first step estimates is known."""
    check_sizes(config, IMAGES, world.size, labelled=False)
    method_class(config.method).check(config, IMAGES, world.size)
    method = build(config, world, IMAGES)
    epoch = next((epoch for epoch in range(config.epochs) if method.expects(epoch)), None)
    if epoch is not None:
        features = torch.randn(IMAGES, method.features().width, generator=torch.Generator().manual_seed(0))
        method.expect(F.normalize(features, dim=1)[slice(*shard_bounds(IMAGES, world.rank, world.size))], epoch)
    if config.method == "instdisc":
        method.estimated = True
        method.log_partition.fill_(5.0)
    learner = Learner(method.double(), config, world)
    learner.set_rate(3)
    return learner


class InFloat64:
    """While it is entered encoders compute in float64, and batch norm with its running statistics if it is frozen."""

    def __init__(self, *, frozen: bool = True):
        self.frozen = frozen

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()

        def encode(method: Method, encode: Callable, images: torch.Tensor):
            if self.frozen:
                method.eval()
            return encode(normalise(images, torch.float32).double())

        def both(encoder: Encoder, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pooled = encoder.backbone(images)
            return pooled, F.normalize(encoder.head(pooled), dim=1)

        self.patch.setattr(Method, "encode", encode)
        self.patch.setattr(Encoder, "both", both)

    def __exit__(self, *_) -> None:
        self.patch.undo()


def steps_of(world: World, config: Config, upstream: float = 1.0, steps: int = 3):
    """Metrics and gradients of every step, and the state after them."""
    with InFloat64():
        learner, seen, gradients = learner_of(config, world), [], []
        method, scale = learner.method, learner.scaler.scale
        learner.scaler.scale = lambda loss: scale(loss) * upstream
        method.before_update = lambda number: gradients.append([p.grad.clone() for p in learner._parameters])
        whole = slice(*shard_bounds(ROWS, world.rank, world.size))
        for number in range(steps):
            seen.append(learner.step(part(views_of(learner, number), whole), number))
        return (
            seen,
            gradients,
            {name: value.clone() for name, value in method.state_dict().items() if value is not True},
        )


def assert_close(found, expected) -> None:
    (metrics, gradients, state), (other_metrics, other_gradients, other_state) = found, expected
    close = {"rtol": 1e-8, "atol": 1e-11}
    for step, other in zip(gradients, other_gradients, strict=True):
        assert any(gradient.any() for gradient in step)
        for gradient, theirs in zip(step, other, strict=True):
            torch.testing.assert_close(gradient, theirs, **close)
    assert state.keys() == other_state.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other_state[name], msg=lambda text, name=name: f"{name}: {text}", **close)
    for values, others in zip(metrics, other_metrics, strict=True):
        assert values.keys() == others.keys()
        torch.testing.assert_close(values["loss"], others["loss"], **close)


@every_method
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_learn_what_the_whole_learns(alone, name, parts):
    """With weights, momentum, queue, bank, momentum encoder and draws, and a random upstream gradient; without batch
    norm's statistics.
    """
    upstream = float(torch.rand(()) + 0.5)
    assert_close(steps_of(alone, config_of(name, parts), upstream), steps_of(alone, config_of(name, 1), upstream))


@every_method
def test_parts_learn_what_the_whole_learns_on_two_ranks(name):
    for found, expected in zip(
        run_ranks(2, steps_of, config_of(name, 3)), run_ranks(2, steps_of, config_of(name, 1)), strict=True
    ):
        assert_close(found, expected)


@pytest.mark.parametrize("name", COMPARING)
def test_the_second_pass_sees_the_statistics_of_the_first(alone, name):
    """With batch norm of the parts: the gradient is that of one graph over all, and running statistics move once a
    part.
    """
    with InFloat64(frozen=False):
        learner, other = (learner_of(config_of(name, 3), alone) for _ in range(2))
        gradients = []
        learner.method.before_update = lambda number: gradients.extend(p.grad.clone() for p in learner._parameters)
        given = views_of(learner, 0)
        values = learner.step(given, 0)
        inputs = other.inputs(given, 0)
        made = join_rows([other.method.represent(share) for share in inputs.divided(3)])
        loss = other.method.compare(made, inputs).loss
        expected = torch.autograd.grad(loss, other._parameters)
    torch.testing.assert_close(values["loss"], loss.detach(), rtol=1e-9, atol=0)
    for gradient, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-8, atol=1e-11)
    for (key, ours), (_, theirs) in zip(
        batch_norm_buffers(learner.method), batch_norm_buffers(other.method), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=key)


def exchanges(world: World, name: str) -> list[int]:
    """How often gradients are exchanged, in buckets, in each of four steps of three parts."""
    config = config_of(name, 3)
    learner, count = learner_of(config, world), []

    def hook(group, bucket):
        count.append(len(bucket.gradients()))
        torch.distributed.all_reduce(bucket.buffer(), group=group)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    learner._forward.register_comm_hook(world.group, hook)
    found = []
    with InFloat64(frozen=False):
        for number in range(4):
            learner.step(part(views_of(learner, number), slice(*shard_bounds(ROWS, world.rank, world.size))), number)
            found.append(sum(count))
            count.clear()
    return found


@pytest.mark.parametrize("name", ["pcl", "siamese_pcl"])
def test_gradients_are_exchanged_once_a_step(name):
    config = config_of(name, 3)
    trained = [p for p in build(config, World(0, 1, torch.device("cpu"), None), IMAGES).parameters() if p.requires_grad]
    assert run_ranks(2, exchanges, name) == [[len(trained)] * 4] * 2


def test_metrics_are_means_over_the_parts(alone):
    """Of the accuracies too, and of what a part has by itself."""
    config = small_config(optim=replace(small_config().optim, accumulate=2))
    learner, other = (Learner(build(config, alone, 6), config, alone) for _ in range(2))
    values = learner.step(batch(), 0)
    inputs = other.inputs(batch(), 0)
    parts = [other.method(share).metrics for share in inputs.divided(2)]
    assert set(values) == {*parts[0], FINITE}
    for name, value in values.items():
        if name != FINITE:
            torch.testing.assert_close(value, torch.stack([metrics[name] for metrics in parts]).mean())


@pytest.mark.parametrize("spoilt", [0, 3])
@pytest.mark.parametrize("method", ["pcl", "simclr"])
def test_a_part_that_is_not_finite_touches_no_weight(alone, monkeypatch, method, spoilt):
    """The first part, or the second and last."""
    base = small_config() if method == "pcl" else tiny(method, optim__batch_size=6)
    config = replace(base, optim=replace(base.optim, accumulate=2))
    learner = Learner(build(config, alone, 6), config, alone)
    learner.set_rate(3)
    encode = type(learner.method).encode
    given = batch()._replace(index=torch.arange(6))
    marked = given.views[0][spoilt].clone()

    def spoil(self, encoder, images):
        features = encode(self, encoder, images)
        hit = (images == marked).flatten(1).all(1)
        return torch.where(hit[:, None], torch.nan, features)

    assert learner.step(given, 0)[FINITE] == 1
    before = [p.detach().clone() for p in learner.method.encoder.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(type(learner.method), "encode", spoil)
        assert learner.step(given, 1)[FINITE] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.method.encoder.parameters(), strict=True))


# --- whole runs -------------------------------------------------------------------------------------------------------


def in_parts(name: str, data: Path, output: Path) -> Config:
    config = recipe(name, data, output)
    return replace(config, optim=replace(config.optim, accumulate=3))


@pytest.mark.parametrize("name", ["pcl", "siamese_pcl"])
def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(name, image_folder, tmp_path):
    """A step counts once, whatever its parts: for epochs, learning rates and the record."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_ranks(2, train, in_parts(name, image_folder, whole)) == [True, True]
    assert load_checkpoint(whole)["global_step"] == EPOCHS * STEPS
    assert len([row for row in read_rows(whole) if row["kind"] == "step"]) == EPOCHS * STEPS
    assert run_ranks(2, train, in_parts(name, image_folder, stopped), SIGNALLED) == [False, False]
    assert 0 < load_checkpoint(stopped)["step"] < STEPS
    assert run_ranks(2, train, in_parts(name, image_folder, stopped)) == [True, True]
    same_state(whole, stopped)
    same_rows(whole, stopped)
    same(load_checkpoint(whole)["ranks"], load_checkpoint(stopped)["ranks"], "ranks")


def test_a_run_may_go_on_in_other_parts():
    before, now = (to_dict(with_parts("simclr", parts)) for parts in (1, 4))
    assert recipe_differences(before, now) == []


# --- what is refused --------------------------------------------------------------------------------------------------


def with_parts(preset: str, parts: int, **model) -> Config:
    config = PRESETS[preset][1]
    return replace(config, optim=replace(config.optim, accumulate=parts), model=replace(config.model, **model))


def test_no_parts_are_refused():
    with pytest.raises(ValueError, match=r"--optim\.accumulate must be positive, got 0"):
        validate(with_parts("simclr", 0))


def test_parts_that_do_not_divide_a_rank_s_batch_are_refused():
    config = with_parts("simclr", 3)
    with pytest.raises(ValueError, match=r"--optim\.accumulate 3 does not divide a rank's batch of 64 images.*12") as e:
        check_sizes(config, 10**6, 4)
    assert "--optim.batch-size 256 on 4 ranks" in str(e.value)
    check_sizes(with_parts("simclr", 4), 10**6, 4)


def test_parts_of_a_single_image_are_refused():
    with pytest.raises(ValueError, match=r"--optim\.accumulate 64 makes parts of a single image.*use fewer parts"):
        check_sizes(with_parts("pcl_v2", 64), 10**6, 4)


def test_parts_that_batch_norm_s_splits_do_not_divide_are_refused():
    config = with_parts("pcl_v2", 16, bn_splits=8)
    with pytest.raises(ValueError, match=r"--model\.bn-splits 8 does not divide.*--optim\.accumulate 16.* of 4;.* 512"):
        method_class("pcl").check(config, 10**6, 4)
    method_class("pcl").check(with_parts("pcl_v2", 8, bn_splits=8), 10**6, 4)


def test_a_method_that_knows_no_parts_is_refused(monkeypatch):
    monkeypatch.setattr(Method, "named", dict(Method.named))

    class Whole(Method, name="whole"):
        pass

    config = replace(with_parts("simclr", 4), method="whole")
    with pytest.raises(ValueError, match=r"--optim\.accumulate 4: whole computes a step as a whole.*pcl.* can; use 1"):
        check_method(config)
    check_method(replace(config, optim=replace(config.optim, accumulate=1)))
