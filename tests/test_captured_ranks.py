"""Several ranks' steps are captured in pieces, between which they exchange what they do where nothing is captured."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launches import same
from methods.every import METHODS, tiny
from ranks import run_ranks
from recording import Operations, Recording
from steps import batch_for, part

from pcl_fast.captured import CapturedStep, capture_pieces
from pcl_fast.clustering import PrototypeSet
from pcl_fast.config import Config
from pcl_fast.distributed import (
    CannotCaptureError,
    World,
    average_gradients,
    between_graphs,
    shard_bounds,
    taking_calls,
)
from pcl_fast.learner import Learner
from pcl_fast.methods import build, method_class

ROWS, STEPS, E_STEP = 12, 9, 4


def learner_of(config: Config, world: World) -> Learner:
    """The same on all ranks and every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner = Learner(build(config, world, ROWS), config, world)
        if config.cluster.ks and config.method == "pcl":
            learner.method.prototypes.replace([_prototypes(k) for k in config.cluster.ks])
    return learner


def _prototypes(k: int) -> PrototypeSet:
    return PrototypeSet(F.normalize(torch.randn(k, 8)), torch.rand(k) + 0.5, torch.arange(ROWS) % k)


def with_tensors(learner: Learner) -> Learner:
    """What is drawn on the host are tensors, as a GPU has them."""
    inputs = learner.inputs
    learner.inputs = lambda *given: inputs(*given).moved(lambda packed: packed)
    return learner


def rows_of(learner: Learner, number: int, world: World):
    rows = part(batch_for(learner.method, seed=number, rows=ROWS), slice(*shard_bounds(ROWS, world.rank, world.size)))
    return rows._replace(views=tuple(view.to(world.device) for view in rows.views))


def take(learner: Learner, step, world: World) -> list[dict[str, float]]:
    """What STEPS steps report; those of PCL have prototypes from step E_STEP on."""
    reports = []
    for number in range(STEPS):
        learner.set_rate(number)
        if learner.method.name == "pcl":
            learner.method.prototypes.found = number >= E_STEP
        found = step(rows_of(learner, number, world), number)
        reports.append({name: round(float(value), 5) for name, value in found.items()})
    return reports


def in_pieces_and_not(world: World, config: Config) -> tuple:
    captured, plain = with_tensors(learner_of(config, world)), learner_of(config, world)
    recording = Recording(captured)
    in_pieces = CapturedStep(captured, recording)
    reports = [take(captured, in_pieces.step, world), take(plain, plain.step, world)]
    states = [copy.deepcopy([learner.state(), learner.own_state()]) for learner in (captured, plain)]
    return states, reports, recording.count, recording.pieces


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", [name for name in METHODS if method_class(name).divisible])
def test_pieces_learn_the_same(name, parts):
    for states, reports, count, pieces in run_ranks(2, in_pieces_and_not, tiny(name, optim__accumulate=parts)):
        assert reports[0] == reports[1]
        same(states[0], states[1], "state")
        assert count == (2 if name == "pcl" else 1)
        assert pieces > 2


def exchanged_within_backward(world: World, config: Config) -> str:
    learner = with_tensors(learner_of(config, world))
    with pytest.raises(CannotCaptureError) as refused:
        take(learner, CapturedStep(learner, Recording(learner)).step, world)
    return str(refused.value)


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_a_backward_pass_is_not_divided(name):
    """Neither for a loss that compares all ranks' images, nor for their batch norm."""
    assert not method_class(name).divisible
    assert (
        run_ranks(2, exchanged_within_backward, tiny(name)) == ["ranks exchange something within the backward pass"] * 2
    )


def test_an_exchange_is_done_between_what_comes_before_and_after(alone):
    """Whenever the work is done again, on what was computed by then, and not while it is captured."""
    x, sent = torch.ones(3), []

    def work() -> torch.Tensor:
        doubled = 2 * x
        between_graphs(lambda: (sent.append(doubled.tolist()), doubled.add_(100)))
        return doubled + 1

    recorder = Operations()
    replay, result = capture_pieces(work, recorder)
    assert (recorder.pieces, sent) == (2, [])
    for value in (1.0, 5.0):
        x.fill_(value)
        replay()
        assert (sent.pop(), result.tolist()) == ([2 * value] * 3, [2 * value + 101] * 3)
    between_graphs(lambda: sent.append("now"))
    assert sent == ["now"]


def test_work_that_fails_leaves_nothing_open():
    def work() -> None:
        between_graphs(lambda: None)
        raise KeyError("of the work")

    recorder = Operations()
    with pytest.raises(KeyError, match="of the work"):
        capture_pieces(work, recorder)
    called = []
    between_graphs(lambda: called.append(1))
    assert called == [1]
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_another_thread_cannot_end_a_piece():
    """As autograd's, for a GPU's backward pass."""
    raised = []

    def exchange() -> None:
        try:
            between_graphs(lambda: None)
        except CannotCaptureError as error:
            raised.append(str(error))

    with taking_calls(lambda call: None):
        thread = threading.Thread(target=exchange)
        thread.start()
        thread.join()
    assert raised == ["ranks exchange something within the backward pass"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has graphs")
def test_graphs_with_exchanges_between_them():
    """By NCCL, which has a group of one GPU too."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = World(0, 1, torch.device("cuda", 0), dist.group.WORLD)
        captured, plain = (learner_of(tiny("pcl"), world) for _ in range(2))
        reports = [take(captured, CapturedStep(captured).step, world), take(plain, plain.step, world)]
        for found, expected in zip(*reports, strict=True):
            assert found == pytest.approx(expected, abs=0.05)
        for a, b in zip(captured.method.parameters(), plain.method.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    finally:
        dist.destroy_process_group()


def mean_of(world: World) -> tuple:
    generator = torch.Generator().manual_seed(world.rank)
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(2, 5)).to(memory_format=torch.channels_last)
    parameters = list(layer.parameters())
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    own = [parameter.grad.clone() for parameter in parameters[:-1]]
    average_gradients(parameters, world.group)
    assert parameters[-1].grad is None
    assert all(parameter.grad.stride() == parameter.stride() for parameter in parameters[:-1])
    return own, [parameter.grad for parameter in parameters[:-1]]


def test_gradients_are_averaged():
    """In their parameters' strides, and only where there are any."""
    (first, mean), (second, other) = run_ranks(2, mean_of)
    for a, b, found, again in zip(first, second, mean, other, strict=True):
        assert torch.equal(found, a / 2 + b / 2)
        assert torch.equal(found, again)
