"""What becomes a branch of a graph, and who waits for whom."""

from __future__ import annotations

import contextlib
import copy
import importlib

import pytest
import torch
from launches import same
from methods.every import tiny
from steps import batch_for

from pcl_fast.distributed import CannotCaptureError, between_graphs, taking_calls
from pcl_fast.learner import Learner
from pcl_fast.methods import build
from pcl_fast.nn import branch as module
from pcl_fast.nn.branch import branch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def streams(said, monkeypatch) -> None:
    """Streams that say what they do, and a capture under way."""

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream: Stream):
        said.append(f"on {stream.name}")
        yield
        said.append(f"off {stream.name}")

    main, side = Stream("main"), Stream("side")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(module, "_side", lambda device: side)


def test_elsewhere_the_work_is_done_when_it_is_asked_for(said):
    with branch(lambda: said.append("work") or 3, CPU) as result:
        said.append("other work")
    assert result() == 3
    assert said == ["other work", "work"]


def test_a_gpu_outside_of_a_capture_does_it_then_too(said, streams, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with branch(lambda: said.append("work") or 3, GPU) as result:
        said.append("other work")
    assert result() == 3
    assert said == ["other work", "work"]


def test_the_branch_begins_and_ends_with_the_context(said, streams):
    with branch(lambda: said.append("work") or 3, GPU) as result:
        said.append("other work")
    assert said == ["side waits for main", "on side", "work", "off side", "other work", "main waits for side"]
    assert result() == 3
    assert len(said) == 6


def test_what_arrives_is_waited_for_before_the_branch_begins(said, streams):
    with branch(lambda a, b: said.append("work") or a + b, GPU, lambda: said.append("arrived") or (1, 2)) as result:
        said.append("other work")
    assert said[:3] == ["arrived", "side waits for main", "on side"]
    assert result() == 3


def test_elsewhere_it_may_arrive_meanwhile(said):
    with branch(lambda a, b: said.append("work") or a + b, CPU, lambda: said.append("arrived") or (1, 2)) as result:
        said.append("other work")
    assert result() == 3
    assert said == ["other work", "arrived", "work"]


def test_ranks_exchange_nothing_while_there_is_a_branch(said, streams):
    """It would end a graph that has an open branch."""
    taken = []
    with taking_calls(taken.append):
        with pytest.raises(CannotCaptureError, match="a branch"), branch(lambda: between_graphs(list), GPU):
            pass
        with pytest.raises(CannotCaptureError, match="a branch"), branch(lambda: 3, GPU):
            between_graphs(list)
        assert said[-1] == "main waits for side"
        between_graphs(list)
    assert taken == [list]


@pytest.mark.parametrize("fails", ["work", "other work"])
def test_after_an_error_no_branch_stays_open(said, streams, fails):
    """Or the end of the capture would be another error."""

    def do(name: str) -> None:
        if name == fails:
            raise torch.cuda.OutOfMemoryError(name)

    with pytest.raises(torch.cuda.OutOfMemoryError, match=fails), branch(lambda: do("work"), GPU):
        do("other work")
    assert said[-1] == "main waits for side"


@contextlib.contextmanager
def at_once(work, device, arrive=tuple):
    """As while a graph is captured."""
    result = work(*arrive())
    yield lambda: result


@pytest.mark.parametrize("name", ["pcl", "byol"])
def test_whichever_is_done_first_a_step_is_the_same(name, monkeypatch, alone):
    config = tiny(name)
    learners = [Learner(build(config, alone, 60), config, alone) for _ in range(2)]
    learners[1].load(copy.deepcopy(learners[0].state()), [copy.deepcopy(learners[0].own_state())])
    for number in range(2):
        rows = batch_for(learners[0].method, number, 12)
        for learner, way in zip(learners, (branch, at_once), strict=True):
            monkeypatch.setattr(importlib.import_module(f"pcl_fast.methods.{name}"), "branch", way)
            learner.set_rate(number)
            learner.step(rows, number)
    same(learners[0].state(), learners[1].state(), "state")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has graphs")
def test_a_graph_with_a_branch_computes_the_same():
    x = torch.randn(512, 512, device=GPU)

    def step() -> torch.Tensor:
        with branch(lambda: (x @ x.T).relu().sum(0), GPU) as other:
            own = (x.T @ x).tanh().sum(0)
        return own + other()

    expected = step()
    side = torch.cuda.Stream(GPU)
    side.wait_stream(torch.cuda.current_stream(GPU))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(GPU).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        graph.replay()
        assert torch.equal(found, expected)
