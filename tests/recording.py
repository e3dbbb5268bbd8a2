"""What stands in for CUDA graphs on a CPU: operations are written down while work goes on, and done again in place.

As in a graph, everything has its place in memory once and for all, and no Python runs when it is done again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pcl_fast.captured import capture_pieces
from pcl_fast.distributed import CannotCaptureError
from pcl_fast.learner import Learner


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if "empty" in str(operation):
            # What ranks send arrives only when all is done again; until then an index must be one.
            result.zero_()
        self.done.append((operation, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def again(self) -> None:
        for operation, args, kwargs, result in self.done:
            for new, old in zip(tree_leaves(operation(*args, **kwargs)), tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor) and new is not old and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class Operations:
    """A recorder of operations, see pcl_fast.captured.Recorder. It counts pieces that have some.

    Like a graph's, a piece cannot end within a backward pass, which on a CPU has no thread of its own.
    """

    def __init__(self) -> None:
        self.pieces = 0

    def begin(self) -> None:
        self._mode = _Operations()
        self._mode.__enter__()

    def end(self) -> Callable[[], None]:
        if torch._C._current_graph_task_id() != -1:
            raise CannotCaptureError("ranks exchange something within the backward pass")
        self._mode.__exit__(None, None, None)
        self.pieces += bool(self._mode.done)
        return self._mode.again


class Recording:
    """A `capture` for CapturedStep. What a learner has is as before when its work is captured, as with a graph."""

    def __init__(self, learner: Learner):
        self.learner, self.count, self.pieces = learner, 0, 0

    def __call__(self, work, device):
        self.count += 1
        kept = [(tensor, tensor.detach().clone()) for tensor in _held(self.learner)]
        operations = Operations()
        try:
            return capture_pieces(work, operations)
        finally:
            self.pieces = operations.pieces
            with torch.no_grad():
                for tensor, before in kept:
                    tensor.copy_(before)


def _held(learner: Learner) -> list[torch.Tensor]:
    optimizer = learner.optimizer
    return [
        *learner.method.parameters(),
        *learner.method.buffers(),
        *(value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)),
        *(group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], torch.Tensor)),
    ]
