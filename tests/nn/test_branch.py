"""What becomes a branch of a graph, and who waits for whom."""

from __future__ import annotations

import contextlib

import pytest
import torch

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
    result = branch(lambda: said.append("work") or 3, CPU)
    assert said == []
    assert result() == 3
    assert said == ["work"]


def test_a_gpu_outside_of_a_capture_does_it_then_too(said, streams, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    result = branch(lambda: said.append("work") or 3, GPU)
    assert said == []
    assert result() == 3
    assert said == ["work"]


def test_the_branch_begins_where_it_is_named_and_ends_where_its_result_is_taken(said, streams):
    result = branch(lambda: said.append("work") or 3, GPU)
    assert said == ["side waits for main", "on side", "work", "off side"]
    assert result() == 3
    assert said[4:] == ["main waits for side"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has graphs")
def test_a_graph_with_a_branch_computes_the_same():
    x = torch.randn(512, 512, device=GPU)

    def step() -> torch.Tensor:
        other = branch(lambda: (x @ x.T).relu().sum(0), GPU)
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
