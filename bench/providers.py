"""The ways to compute the loss that are measured: first what a user would run otherwise, then ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import official
import sdpa
import torch

from pcl_fast.losses import pcl_loss

Loss = Callable[[torch.Tensor], torch.Tensor]  # query -> scalar loss
GRAPH = "+graph"


def official_loss(inputs: dict, seed: torch.Tensor) -> Loss:
    return partial(official.loss, **inputs)  # without the seed: it draws on the host, from Python's own generator


def eager_loss(inputs: dict, seed: torch.Tensor) -> Loss:
    return partial(_pcl_loss, **inputs, seed=seed, backend="torch")


def compiled_loss(inputs: dict, seed: torch.Tensor) -> Loss:
    # It is compiled as one graph for the case's shapes, or fails. Without the reset a later case would reach the limit
    # of recompilations, and would run eagerly without a word.
    torch.compiler.reset()
    return partial(torch.compile(_pcl_loss, dynamic=False, fullgraph=True), **inputs, seed=seed, backend="torch")


def sdpa_loss(inputs: dict, seed: torch.Tensor) -> Loss:
    return partial(sdpa.loss, **{**inputs, "prototypes": sdpa.prescale(inputs["prototypes"])}, seed=seed)


def triton_loss(inputs: dict, seed: torch.Tensor) -> Loss:
    return partial(_pcl_loss, **inputs, seed=seed, backend="triton")


def _pcl_loss(query: torch.Tensor, **arguments) -> torch.Tensor:
    return pcl_loss(query, **arguments).loss


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
    """Return a function that computes the whole loss forward and backward, and returns the query's gradient."""
    loss = PROVIDERS[name](inputs, seed)

    def forward_and_backward() -> torch.Tensor:
        leaf = query.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return forward_and_backward
