"""The ways to compute the loss that are measured: what a user would run otherwise, then ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import official
import sdpa
import torch

from pcl_fast.losses import protonce

Loss = Callable[[torch.Tensor], torch.Tensor]  # scalar loss of a query
GRAPH = "+graph"


def official_loss(inputs: dict, seed: torch.Tensor) -> Loss:
    return partial(official.loss, **inputs)  # draws on the host, from Python's own generator


def eager_loss(inputs: dict, seed: torch.Tensor) -> Loss:
    return partial(_protonce, **inputs, seed=seed, backend="torch")


def compiled_loss(inputs: dict, seed: torch.Tensor) -> Loss:
    # Compiled as one graph for the case's shapes, or not at all. Without the reset a later case would reach the limit
    # of recompilations and silently run eagerly.
    torch.compiler.reset()
    return partial(torch.compile(_protonce, dynamic=False, fullgraph=True), **inputs, seed=seed, backend="torch")


def sdpa_loss(inputs: dict, seed: torch.Tensor) -> Loss:
    return partial(sdpa.loss, **{**inputs, "prototypes": sdpa.prescale(inputs["prototypes"])}, seed=seed)


def triton_loss(inputs: dict, seed: torch.Tensor) -> Loss:
    return partial(_protonce, **inputs, seed=seed, backend="triton")


def _protonce(query: torch.Tensor, **arguments) -> torch.Tensor:
    return protonce(query, **arguments).loss


PROVIDERS: dict[str, Callable[[dict, torch.Tensor], Loss]] = {
    "official": official_loss,
    "eager": eager_loss,
    "compile": compiled_loss,
    "compile" + GRAPH: compiled_loss,
    "sdpa": sdpa_loss,
    "triton": triton_loss,
    "triton" + GRAPH: triton_loss,
}


def step(name: str, query: torch.Tensor, inputs: dict, seed: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward and backward of the whole loss; returns the gradient."""
    loss = PROVIDERS[name](inputs, seed)

    def forward_and_backward() -> torch.Tensor:
        leaf = query.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return forward_and_backward
