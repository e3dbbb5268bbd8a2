"""A learner's steps as CUDA graphs: the host sends one launch to the GPU instead of some thousand.

Where ranks exchange something within a step, one graph ends and the next begins, and the exchange stands between them.
All pieces of a step share their memory, so that autograd goes from one into another.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

from pcl_fast.data import Batch
from pcl_fast.distributed import taking_calls
from pcl_fast.learner import Learner
from pcl_fast.methods import Inputs

# Steps that are taken as they are before one is captured: kernels are compiled and workspaces allocated in them.
_WARM_UP = 3

Work = Callable[[], Any]


class CapturedStep:
    """Takes a learner's steps by replaying one of them with other inputs.

    What a step does besides computing on its inputs must be the same as in the step that was captured. Where that
    changes (`Method.phase`, or the shapes of its inputs) a step is captured anew.
    """

    def __init__(
        self,
        learner: Learner,
        capture: Callable[[Work, torch.device], tuple[Work, Any]] | None = None,
    ):
        """
        Args:
            learner: exchanges gradients after the backward pass from now on. Where there are several ranks its method's
                steps are `divisible`.
            capture: takes (work, device), and returns a function that does the work again, and what work() returned,
                which that function overwrites. None: `capture_graph`.
        """
        self._learner, self._capture = learner, capture or capture_graph
        learner.exchange_gradients_last()
        self._phase: Any = None
        self._warm_up = _WARM_UP
        self._inputs: Inputs | None = None
        self._replay: Work | None = None
        self._names: list[str] = []
        self._values = torch.empty(0)

    def step(self, batch: Batch, number: int) -> dict[str, torch.Tensor]:
        """One optimiser step, see Learner.step."""
        inputs = self._learner.inputs(batch, number)
        phase = (self._learner.method.phase(number), [tuple(view.shape) for view in inputs.views], list(inputs.drawn))
        if phase != self._phase:
            self._phase, self._warm_up, self._replay, self._inputs = phase, _WARM_UP, None, None
        if self._warm_up:
            self._warm_up -= 1
            return self._learner.compute(inputs, number)
        if self._replay is None:
            self._begin(inputs, number)
        self._inputs.copy_(inputs)
        self._replay()
        # The next step overwrites them. One copy for all.
        return dict(zip(self._names, self._values.clone().unbind(), strict=True))

    def _begin(self, inputs: Inputs, number: int) -> None:
        self._inputs = Inputs(
            tuple(view.clone() for view in inputs.views),
            inputs.index.clone(),
            {name: value.clone() for name, value in inputs.drawn.items()},
        )

        def work() -> torch.Tensor:
            values = self._learner.compute(self._inputs, number)
            self._names = list(values)
            return torch.stack([value.float() for value in values.values()])

        self._replay, self._values = self._capture(work, self._learner.world.device)


def capture_graph(work: Work, device: torch.device) -> tuple[Work, Any]:
    """Capture work() as CUDA graphs, without doing it: as one, or where ranks exchange something within it as several.

    Returns:
        A function that does it, and what work() returned: tensors that every replay overwrites.

    Raises:
        RuntimeError: the work waits for the device, or does something else that cannot be captured.
        CannotCaptureError: ranks exchange something where a graph cannot end.
    """
    # What earlier steps have used is no longer needed, and a graph has memory of its own.
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    with torch.cuda.stream(_stream(device)):
        return capture_pieces(work, _Graphs())


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, since PyTorch has 32 of them and then begins anew."""
    return torch.cuda.Stream(device)


class Recorder(Protocol):
    """Records what is computed from `begin` to `end`, which returns a function that computes it again in place."""

    def begin(self) -> None: ...

    def end(self) -> Work: ...


def capture_pieces(work: Work, recorder: Recorder) -> tuple[Work, Any]:
    """`capture_graph` by a recorder."""
    pieces: list[Work] = []

    def exchange(call: Work) -> None:
        pieces.append(recorder.end())
        pieces.append(call)
        recorder.begin()

    recorder.begin()
    try:
        with taking_calls(exchange):
            result = work()
    except BaseException:
        with suppress(RuntimeError):  # a capture that has failed can have no good end
            recorder.end()
        raise
    pieces.append(recorder.end())

    def replay() -> None:
        for piece in pieces:
            piece()

    return pieces[0] if len(pieces) == 1 else replay, result


class _Graphs:
    """Records CUDA graphs on the current stream, one after another in the same memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Loaders' threads go on meanwhile, with calls that a capture would not allow them.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Work:
        with warnings.catch_warnings():
            # Nothing need be computed between two exchanges.
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            self._graph.capture_end()
        return self._graph.replay
