"""Learners that are broken in ways that a CPU does not notice, on a pretended GPU of four ranks, as a program.

Prints a JSON object: what was seen, by what is broken. "nothing" is the learner as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from gpu import DEVICE, PretendedGPU
from run_steps import IMAGES, SETTLED, attempt, recipes, start, steps

import pcl_fast.learner
import pcl_fast.methods.base
import pcl_fast.methods.pcl
import pcl_fast.optim
from pcl_fast.config import Config
from pcl_fast.data import Batch
from pcl_fast.distributed import World
from pcl_fast.learner import Learner
from pcl_fast.methods import Inputs, build


def _looked_at(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    norms = torch.stack([p.grad.norm() for p in parameters if p.grad is not None])
    return torch.tensor(bool(norms.isfinite().all()), device=DEVICE)


def _not_pinned(learner: Learner, batch: Batch, number: int) -> Inputs:
    inputs = Inputs(batch.views, batch.index, learner.method.draw(batch, number))
    return inputs.moved(lambda packed: packed.to(DEVICE, non_blocking=True))


def _left_behind(learner: Learner, batch: Batch, number: int) -> Inputs:
    inputs = Inputs(batch.views, batch.index, learner.method.draw(batch, number))
    return inputs.moved(lambda packed: packed.to(DEVICE))._replace(index=batch.index)


def _flat_momentum(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros(p.shape, device=p.device)


def _by_the_host(rows: torch.Tensor, group: torch.distributed.ProcessGroup | None) -> torch.Tensor:
    return gather(rows.cpu(), group).to(rows.device)


def _unsigned(rows: torch.Tensor, group: torch.distributed.ProcessGroup | None) -> torch.Tensor:
    return gather(rows.view(torch.int16), group).view(rows.dtype)


gather = pcl_fast.methods.pcl.all_gather_rows
BREAKS: dict[str, tuple[object, str, Callable]] = {
    "nothing": (pcl_fast.learner, "_all_finite", pcl_fast.learner._all_finite),
    "a flag is looked at": (pcl_fast.learner, "_all_finite", _looked_at),
    "inputs are not pinned": (Learner, "inputs", _not_pinned),
    "the index stays on the host": (Learner, "inputs", _left_behind),
    "momentum is not in the weights' order": (pcl_fast.optim, "_begin_momentum", _flat_momentum),
    "keys are gathered by the host": (pcl_fast.methods.pcl, "all_gather_rows", _by_the_host),
    "keys are gathered as 16-bit integers": (pcl_fast.methods.pcl, "all_gather_rows", _unsigned),
    "autocast is forgotten": (pcl_fast.methods.base, "autocast", lambda device: nullcontext()),
}


def broken_steps(gpu: PretendedGPU, config: Config, world: World) -> dict[str, Any]:
    learner = Learner(build(config, world, IMAGES * world.size), config, world)
    return steps(gpu, learner, config, SETTLED)


if __name__ == "__main__":
    world, gpu = start(4)
    config = next(config for name, config in recipes(4) if name == "pcl, bn_splits 4")
    seen = {}
    with gpu:
        for name, (where, what, replacement) in BREAKS.items():
            with patch.object(where, what, replacement):
                seen[name] = attempt(broken_steps, gpu, config, world)
    print(json.dumps(seen))
