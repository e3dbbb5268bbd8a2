"""A momentum that grows in the course of a run. (test_model.py has the constant one.)"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pcl_fast.nn.momentum import GrowingMovingAverage, momentum_copy

STEPS = 1_000_000


def pair() -> tuple[nn.Module, nn.Module]:
    encoder = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    follower = momentum_copy(encoder)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    return follower, encoder


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("number", [0, 1, 123_456, 500_000, 999_000, 999_999])
def test_the_schedule_is_the_paper_s(number, as_tensor):
    """To more digits than float32 has. The paper's own formula cancels towards the end: by an absolute error then."""
    average = GrowingMovingAverage(*pair(), 0.996, STEPS)
    share = average.share(torch.tensor(number) if as_tensor else number)
    assert (share.dtype, share.ndim) == (torch.float64, 0)
    momentum = 1 - (1 - 0.996) * (math.cos(math.pi * number / STEPS) + 1) / 2
    assert 1 - share.item() == pytest.approx(momentum, rel=1e-15)
    by_half_the_angle = 0.004 * math.sin(math.pi / 2 * (STEPS - number) / STEPS) ** 2
    assert share.item() == pytest.approx(by_half_the_angle, rel=1e-12)


def test_from_the_end_on_the_momentum_is_1():
    average = GrowingMovingAverage(*pair(), 0.9, 10)
    assert [average.share(number).item() for number in (10, 11, 1000)] == [0, 0, 0]
    assert average.share(9).item() > 0
    assert average.share(0).item() == pytest.approx(0.1, rel=1e-12)


def test_parameters_move_by_the_share_of_the_step():
    follower, encoder = pair()
    average = GrowingMovingAverage(follower, encoder, 0.9, 10)
    expected = {name: p.detach().double() for name, p in follower.named_parameters()}
    for number in (0, 4, 9):
        average.update(number, torch.tensor(True))
        momentum = 1 - 0.1 * (math.cos(math.pi * number / 10) + 1) / 2
        for name, parameter in encoder.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * parameter.detach().double()
    for name, parameter in follower.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert parameter.grad is None


def test_statistics_stay_and_so_does_everything_if_no_update_was_applied():
    follower, encoder = pair()
    average = GrowingMovingAverage(follower, encoder, 0.9, 10)
    encoder(torch.randn(7, 3))
    before = {name: value.clone() for name, value in follower.state_dict().items()}
    average.update(0, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in follower.state_dict().items())
    average.update(0, torch.tensor(True))
    assert torch.equal(follower[1].running_mean, before["1.running_mean"])
    assert not torch.equal(follower[0].weight, before["0.weight"])
