"""What ranks compute together."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from pcl_fast.distributed import all_gather_with_gradient, shard_bounds


def gather_and_weigh(world, rows: torch.Tensor, weights: torch.Tensor):
    """This rank's loss is a weighted sum of all ranks' squares: (what was gathered, gradient of this rank's rows)."""
    mine = rows[slice(*shard_bounds(len(rows), world.rank, world.size))].clone().requires_grad_()
    gathered = all_gather_with_gradient(mine, world.group)
    upstream = weights[world.rank].clone()
    gathered.square().backward(upstream)
    assert torch.equal(upstream, weights[world.rank])
    return gathered.detach(), mine.grad


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_flow_back_from_all_ranks(size):
    rows, weights = torch.randn(6, 4), torch.randn(size, 6, 4)
    found = run_ranks(size, gather_and_weigh, rows, weights)
    for gathered, _ in found:
        assert torch.equal(gathered, rows)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found]), 2 * rows * weights.sum(0))


def gradient_through_the_same_gathered(world, rows: torch.Tensor):
    """The gradient of what was gathered is looked at by a hook as well: it must not be summed over ranks in place."""
    mine = rows[world.rank].clone().requires_grad_()
    gathered = all_gather_with_gradient(mine, world.group)
    seen = []
    gathered.register_hook(seen.append)
    gathered.mean().backward()
    return seen[0].clone(), mine.grad


def test_the_gradient_that_arrives_is_left_as_it_is():
    for seen, gradient in run_ranks(2, gradient_through_the_same_gathered, torch.randn(2, 3, 4)):
        torch.testing.assert_close(seen, torch.full((6, 4), 1 / 24))
        torch.testing.assert_close(gradient, torch.full((3, 4), 2 / 24))


def test_alone_there_is_nothing_to_gather():
    rows = torch.randn(3, 2, requires_grad=True)
    assert all_gather_with_gradient(rows, None) is rows
