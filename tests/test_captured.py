"""Steps that replay a captured one learn what steps learn that are taken one by one.

A CPU has no graphs: what stands in for one does the captured work again, with the tensors that it was captured with.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from launches import same
from methods import crops  # noqa: F401, a method
from methods.every import tiny
from steps import batch, batch_for, learner_of, small_config

from pcl_fast.captured import CapturedStep
from pcl_fast.clustering import PrototypeSet
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import build

GPU = torch.cuda.is_available()
WORLD = World(0, 1, torch.device("cuda", 0) if GPU else torch.device("cpu"), None)


class Graphs:
    """Counts captures, and keeps a learner as it was while its work is captured."""

    def __init__(self, learner: Learner):
        self.learner, self.count = learner, 0

    def __call__(self, work, device):
        self.count += 1
        before = copy.deepcopy(self.learner.state())
        result = work()
        self.learner.load(before, [self.learner.own_state()])
        return lambda: result.copy_(work()), result


def learner_with_tensors(monkeypatch, parts: int = 1) -> Learner:
    """What is drawn on the host are tensors, as a GPU has them.

    parts: of a step.
    """
    prototypes = [PrototypeSet(torch.nn.functional.normalize(torch.randn(5, 8)), torch.ones(5), torch.arange(6) % 5)]
    config = small_config()
    config = replace(config, optim=replace(config.optim, accumulate=parts))
    learner = learner_of(config, WORLD, prototypes)
    learner.method.prototypes.found = False
    inputs = learner.inputs
    if not GPU:
        monkeypatch.setattr(learner, "inputs", lambda *given: inputs(*given).moved(lambda packed: packed))
    return learner


@pytest.mark.skipif(GPU, reason="counts captures of a stand-in")
def test_two_passes_over_parts_can_be_captured():
    """As NT-Xent takes them."""
    config = tiny("simclr", optim__batch_size=6, optim__accumulate=3)
    one, other = (Learner(build(config, WORLD, 6), config, WORLD) for _ in range(2))
    graphs = Graphs(other)
    captured = CapturedStep(other, graphs)
    for number in range(6):
        for learner in (one, other):
            learner.set_rate(number)
        found, expected = captured.step(batch(number), number), one.step(batch(number), number)
        torch.testing.assert_close(found["loss"], expected["loss"])
    assert graphs.count == 1
    same(other.state(), one.state(), "state")


def on_device(given):
    return given._replace(views=tuple(view.to(WORLD.device) for view in given.views))


@pytest.mark.parametrize("parts", [1, 3])
def test_captured_steps_learn_the_same(monkeypatch, parts):
    """A step of several parts is captured as a whole."""
    torch.manual_seed(0)
    one = learner_with_tensors(monkeypatch, parts)
    other = learner_with_tensors(monkeypatch, parts)
    other.load(copy.deepcopy(one.state()), [copy.deepcopy(one.own_state())])
    graphs = Graphs(other)
    captured = CapturedStep(other, None if GPU else graphs)
    found, expected = [], []
    for number in range(14):
        for learner in (one, other):
            learner.set_rate(number // 3)
            learner.method.prototypes.found = number >= 7  # the first E-step
        given = on_device(batch(seed=number))
        expected.append(one.step(given, number))
        found.append(captured.step(given, number))
    assert GPU or graphs.count == 2
    # Now, after later steps: none has overwritten what an earlier one returned.
    for number, (values, others) in enumerate(zip(found, expected, strict=True)):
        for name, value in others.items():
            torch.testing.assert_close(values[name], value.float(), msg=f"{name} of step {number}")
    if not GPU:
        same(other.state(), one.state(), "state")
    for a, b in zip(other.method.parameters(), one.method.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(GPU, reason="counts captures of a stand-in")
def test_other_shapes_are_captured_anew(monkeypatch):
    learner = learner_with_tensors(monkeypatch)
    graphs = Graphs(learner)
    captured = CapturedStep(learner, graphs)
    for number, rows in enumerate([6] * 5 + [4] * 5):
        captured.step(batch(seed=number, rows=rows), number)
    assert graphs.count == 2


@pytest.mark.skipif(GPU, reason="counts captures of a stand-in")
def test_views_of_several_sizes_are_captured(monkeypatch):
    """Once, and they are the views of every step."""
    config = small_config(method="crops")
    one, other = (Learner(build(config, WORLD, 60), config, WORLD) for _ in range(2))
    for learner in (one, other):
        learner.set_rate(0)
    graphs = Graphs(other)
    captured = CapturedStep(other, graphs)
    for number in range(6):
        given = batch_for(one.method, seed=number)
        torch.testing.assert_close(captured.step(given, number)["loss"], one.step(given, number)["loss"])
    assert graphs.count == 1
    same(other.state(), one.state(), "state")
