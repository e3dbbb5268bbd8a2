"""A step in parts, of which one at a time is in memory: batches that are larger than the GPUs.

The batch is that of the whole step, and so are loss, gradient, draws, keys and metrics. Only batch norm sees a part:
its statistics are of that, and its running statistics move once for each.

A method whose loss is a mean over images adds the gradients of its parts, each with the part's share of the loss.

One that compares the images of a step with each other takes two passes, as GradCache does (Gao et al. 2021). The first
encodes all parts and keeps what comes out, but nothing of what a backward pass would need; the loss of all, and its
gradient with respect to that, cost little. The second encodes each part again, with that gradient for its backward
pass. By the chain rule the sum over the parts is the gradient of the loss of the whole, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from pcl_fast.methods import Inputs, Method, Step, join_rows
from pcl_fast.nn.batch_norm import running_statistics_kept

# Turns a loss into (what its backward pass begins with, the gradient that it begins with).
Scale = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def pass_in_parts(forward: Method | DistributedDataParallel, inputs: Inputs, parts: int, scale: Scale) -> Step:
    """A step's forward pass in so many parts, and the backward passes of all but the last.

    Ranks exchange gradients in the backward pass of what is returned, or after it, once a step.

    Args:
        forward: the method, of whose kinds of `accumulation` one is given; or what has it wrapped for several ranks.
        inputs: of the whole step.

    Returns:
        A loss whose gradient, added to those that parameters have by now, is the step's; metrics and carry of all.
    """
    method = forward.module if isinstance(forward, DistributedDataParallel) else forward
    if method.accumulation == "compare":
        return _compared(forward, method, inputs.divided(parts), inputs, scale)
    return _averaged(forward, method, inputs.divided(parts), scale)


def _averaged(forward: Method | DistributedDataParallel, method: Method, parts: Sequence[Inputs], scale: Scale) -> Step:
    metrics, carries = [], []
    for part in parts[:-1]:
        with _alone(forward):
            step = forward(part)
            scaled, upstream = scale(step.loss / len(parts))
            scaled.backward(upstream)
        metrics.append(step.metrics)
        carries.append(step.carry)
    last = forward(parts[-1])
    metrics.append(last.metrics)
    means = {name: torch.stack([values[name] for values in metrics]).mean(0) for name in last.metrics}
    return Step(last.loss / len(parts), means, method.join([*carries, last.carry]))


def _compared(
    forward: Method | DistributedDataParallel, method: Method, parts: Sequence[Inputs], whole: Inputs, scale: Scale
) -> Step:
    # Or they would move twice.
    with torch.no_grad(), running_statistics_kept(method):
        made = [method.represent(part) for part in parts]
    leaves = tuple(rows.detach().requires_grad_() for rows in join_rows(made))
    scaled, upstream = scale(method.compare(leaves, whole).loss)
    gradients = torch.autograd.grad(scaled, leaves, upstream)
    of_parts = zip(*(gradient.chunk(len(parts)) for gradient in gradients), strict=True)
    for part, gradient in zip(parts[:-1], of_parts, strict=False):
        with _alone(forward):
            torch.autograd.backward(method.represent(part), gradient)
    # The loss itself follows, so that what is trained beside the encoder gets its gradient in the same backward pass.
    last = parts[-1]
    return forward(last._replace(part=last.part._replace(others=tuple(made[:-1]))))


def _alone(forward: Method | DistributedDataParallel) -> AbstractContextManager:
    """In this context gradients stay this rank's own."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()
