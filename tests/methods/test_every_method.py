"""What every method promises: a run goes on as if nothing had stopped it, the checkpoint holds all that it has, no
label is used, and everything that is trained gets a gradient. A new method is taken in by its preset.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import same, same_rows, same_state
from methods.every import METHODS, tiny
from ranks import run_ranks

import pcl_fast.train
from pcl_fast.config import Config
from pcl_fast.data import Batch, ImageSet
from pcl_fast.data.loaders.loader import pick_loader
from pcl_fast.distributed import World
from pcl_fast.learner import FINITE, Learner
from pcl_fast.methods import Inputs, build, check_method, method_class
from pcl_fast.run.checkpoint import load_checkpoint
from pcl_fast.run.metrics import StepMetrics, read_rows

EPOCHS, STEPS, ROWS, IMAGES = 3, 4, 12, 53
# In the midst of the second epoch; the run stops a step later.
SIGNALLED = STEPS + 1
every_method = pytest.mark.parametrize("name", METHODS)
pytestmark = pytest.mark.usefixtures("one_thread")


# --- whole runs on two ranks ------------------------------------------------------------------------------------------


def recipe(name: str, data: Path, output: Path, threads: int = 1) -> Config:
    """threads: of the loader, where it has threads; else it works in the run's own process."""
    config = tiny(
        name,
        data__root=data,
        data__workers=threads if pick_loader("auto") == "dali" else 0,
        output=output,
        epochs=EPOCHS,
        log_every=1,
        evaluation__every=2,
        evaluation__neighbours=5,
        evaluation__ks=(),
        checkpoint__keep_every=0,
    )
    check_method(config)
    return config


def train(world: World, config: Config, signalled: int | None = None, *, relabelled: bool = False) -> bool:
    """Train, or go on; whether it came to its end. SIGTERM comes to the main rank after so many steps of the run."""
    add, find = StepMetrics.add, pcl_fast.train.open_images

    def watched(self: StepMetrics, reached: int, *arguments: Any) -> None:
        add(self, reached, *arguments)
        if reached == signalled and world.is_main:
            os.kill(os.getpid(), signal.SIGTERM)

    def with_other_labels(*arguments: Any) -> ImageSet:
        images = find(*arguments)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1)).tolist()
        return replace(images, labels=[images.labels[number] for number in order])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepMetrics, "add", watched)
        patch.setattr(pcl_fast.train, "write_report", lambda *_: "not drawn")
        if relabelled:
            patch.setattr(pcl_fast.train, "open_images", with_other_labels)
        return pcl_fast.train.run(config, world)


def train_relabelled(world: World, config: Config) -> bool:
    return train(world, config, relabelled=True)


@pytest.fixture(scope="module", params=METHODS)
def whole(request, image_folder, tmp_path_factory) -> tuple[str, Path]:
    """A method, and its run on two ranks that nothing stopped."""
    output = tmp_path_factory.mktemp(request.param)
    assert run_ranks(2, train, recipe(request.param, image_folder, output)) == [True, True]
    state = load_checkpoint(output)
    assert (state["finished"], state["global_step"]) == (True, EPOCHS * STEPS)
    return request.param, output


def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(whole, image_folder, tmp_path):
    name, expected = whole
    config = recipe(name, image_folder, tmp_path)
    assert run_ranks(2, train, config, SIGNALLED) == [False, False]
    stopped = load_checkpoint(tmp_path)
    assert stopped["epoch"] == 1
    assert 0 < stopped["step"] < STEPS
    assert run_ranks(2, train, config) == [True, True]
    same_state(expected, tmp_path)
    same_rows(expected, tmp_path)
    same(load_checkpoint(expected)["ranks"], load_checkpoint(tmp_path)["ranks"], "ranks")


def test_neither_labels_nor_the_loader_s_threads_change_what_is_learned(whole, image_folder, tmp_path):
    """Labels are shuffled, and evaluated; and there are three threads in place of one."""
    name, expected = whole
    assert run_ranks(2, train_relabelled, recipe(name, image_folder, tmp_path, threads=3)) == [True, True]
    same_state(expected, tmp_path)
    scores, others = (
        [row["knn"] for row in read_rows(folder) if row["kind"] == "evaluation"] for folder in (expected, tmp_path)
    )
    assert len(scores) == len(others) > 0
    assert scores != others


# --- steps by themselves ----------------------------------------------------------------------------------------------


def views_of(learner: Learner, number: int) -> Batch:
    """A batch whose images differ in more than noise, in the order of the method's epoch if it has one."""
    generator, method = torch.Generator().manual_seed(number), learner.method
    order = method.order(0)
    index = torch.arange(IMAGES) if order is None else torch.as_tensor(order)
    index = index[ROWS * number % (IMAGES - ROWS) :][:ROWS]
    colours = torch.randint(0, 200, (ROWS, 1, 1, 3), generator=generator)
    views = [
        colours + torch.randint(0, 56, (ROWS, view.size, view.size, 3), generator=generator) for view in method.views
    ]
    return Batch(tuple(view.to(torch.uint8) for view in views), index)


def ready(name: str, world: World) -> Learner:
    """After the first E-step, if the method has any."""
    config = tiny(name)
    method_class(name).check(config, IMAGES, world.size)
    learner = Learner(build(config, world, IMAGES), config, world)
    learner.set_rate(3)
    method = learner.method
    epoch = next((epoch for epoch in range(config.epochs) if method.expects(epoch)), None)
    if epoch is not None:
        features = torch.randn(IMAGES, method.features().width, generator=torch.Generator().manual_seed(0))
        method.expect(torch.nn.functional.normalize(features, dim=1), epoch)
    return learner


@every_method
def test_the_checkpoint_holds_everything(name, alone):
    """What has loaded it takes the same steps, whatever else has drawn from this process's random numbers."""
    learner, fresh = ready(name, alone), Learner(build(tiny(name), alone, IMAGES), tiny(name), alone)
    for number in range(2):
        learner.step(views_of(learner, number), number)
    file = io.BytesIO()
    torch.save((learner.state(), [learner.own_state()]), file)
    file.seek(0)
    fresh.load(*torch.load(file, weights_only=False))
    fresh.set_rate(3)
    for number in range(2, 4):
        batch = views_of(learner, number)
        values = learner.step(batch, number)
        with other_random_numbers():
            same(values, fresh.step(batch, number), "metrics")
    assert values[FINITE] == 1
    same(learner.state(), fresh.state(), "state")
    same(learner.own_state()["method"], fresh.own_state()["method"], "own state")


@contextmanager
def other_random_numbers() -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(17)
    yield
    torch.set_rng_state(state)


@every_method
def test_everything_that_is_trained_gets_a_gradient(name, alone):
    learner = ready(name, alone)
    inputs: Inputs = learner.inputs(views_of(learner, 0), 0)
    step = learner.method(inputs)
    assert set(step.metrics) <= set(learner.method.metrics)
    step.loss.backward()
    trained = {n: p for n, p in learner.method.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None]
    assert not [n for n, p in trained.items() if not p.grad.isfinite().all()]
    assert not [n for n, p in trained.items() if not p.grad.any()]
    assert not [n for n, p in learner.method.named_parameters() if not p.requires_grad and p.grad is not None]
