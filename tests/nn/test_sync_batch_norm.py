"""Batch norm over the batches of all ranks, against one process that has them all."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

from pcl_fast.config import ModelConfig
from pcl_fast.nn import sync_batch_norm as module
from pcl_fast.nn.batch_norm import fold_batch_norm
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.sync_batch_norm import SyncBatchNorm, normalise, sync_batch_norm

SHAPES = pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 5, 4, 3)], ids=str)
EPS = 1e-5


def plain_norm(shape: tuple[int, ...], **options) -> nn.Module:
    """With parameters and statistics of its own."""
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1], **options)
    with torch.no_grad():
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    return norm


def synchronised(norm: nn.Module, group=None) -> SyncBatchNorm:
    whole = nn.Sequential(copy.deepcopy(norm))
    sync_batch_norm(whole, group)
    return whole[0]


def values(shape: tuple[int, ...], dtype=torch.float32) -> torch.Tensor:
    """Rows and channels differ in mean and in spread."""
    spread = torch.rand(shape[0], shape[1], *[1] * (len(shape) - 2), dtype=dtype) + 0.2
    return torch.randn(shape, dtype=dtype) * spread + torch.randn_like(spread)


# --- on one process -----------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_of_one_rank_it_is_pytorch_s(shape, affine, dtype, tolerance):
    """By our own operations, which a group of ranks takes. Plain batch norm in float64 is the oracle."""
    x, upstream = values(shape, dtype).requires_grad_(), torch.randn(shape, dtype=dtype)
    leaves = [x, *(torch.rand(2, shape[1], dtype=dtype).unbind() if affine else [])]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    parameters, exact_parameters = leaves[1:] or [None, None], exact[1:] or [None, None]
    expected = F.batch_norm(exact[0], None, None, *exact_parameters, training=True, eps=EPS)
    found, statistics = normalise(leaves[0], *parameters, EPS, None)
    assert found.dtype == dtype
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found.double(), expected, **close)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for ours, theirs in zip(torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **close)
    dims = [0, *range(2, len(shape))]
    torch.testing.assert_close(statistics.mean.double(), exact[0].detach().mean(dims), **close)
    torch.testing.assert_close(statistics.variance.double(), exact[0].detach().var(dims, correction=0), **close)


def test_gradients_by_finite_differences():
    x = values((3, 2, 2, 2), torch.float64).requires_grad_()
    weight, bias = torch.randn(2, 2, dtype=torch.float64).unbind()
    leaves = (x, weight.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(lambda *leaves: normalise(*leaves, EPS, None)[0], leaves)


@SHAPES
@pytest.mark.parametrize("training", [True, False])
def test_without_a_group_it_is_the_norm_it_was_made_of(shape, training):
    norm, x = plain_norm(shape).train(training), values(shape)
    ours = synchronised(norm).train(training)
    assert torch.equal(ours(x), norm(x))
    for name, tensor in norm.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_memory_format_stays_and_any_gradient_will_do():
    x = values((4, 5, 3, 3)).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.rand(2, 5).unbind()
    found, _ = normalise(x, weight, bias, EPS, None)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for upstream in (torch.randn(4, 5, 3, 3), torch.randn(4, 5, 1, 1).expand(4, 5, 3, 3)):
        gradient = torch.autograd.grad(found, x, upstream, retain_graph=True)[0]
        assert gradient.is_contiguous(memory_format=torch.channels_last)
        expected = F.batch_norm(x, None, None, weight, bias, training=True)
        wanted = torch.autograd.grad(expected, x, upstream)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
    assert normalise(torch.randn(4, 5, 3, 3).transpose(2, 3), weight, bias, EPS, None)[0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_up_in_float32(dtype):
    """Only what is as large as x is rounded to its precision."""
    leaves = [(values((16, 5, 8, 8)) + 30).to(dtype), *torch.rand(2, 5).unbind()]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    upstream = torch.randn(16, 5, 8, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, statistics = normalise(*leaves, EPS, None)
    expected = F.batch_norm(exact[0], None, None, *exact[1:], training=True, eps=EPS)
    half = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **half)
    variance = exact[0].detach().var((0, 2, 3), correction=0)
    torch.testing.assert_close(statistics.variance.double(), variance, rtol=1e-5, atol=0)
    dx, *of_parameters = torch.autograd.grad(found, leaves, upstream)
    wanted, *exact_of_parameters = torch.autograd.grad(expected, exact, upstream.double())
    assert dx.dtype == dtype
    torch.testing.assert_close(dx.double(), wanted, **half)
    for ours, theirs in zip(of_parameters, exact_of_parameters, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's fused operations exist for GPUs alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 5), (8, 5, 4, 3)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_operations_do_what_the_plain_ones_do(shape, dtype, memory_format):
    x, upstream = (values(shape).to(dtype) for _ in range(2))
    if len(shape) == 4:
        x = x.to(memory_format=memory_format)
    weight, bias = torch.rand(2, 5).unbind()
    results = []
    for device in ("cpu", "cuda"):
        leaves = [leaf.to(device).requires_grad_() for leaf in (x, weight.clone(), bias.clone())]
        y, statistics = normalise(*leaves, EPS, None)
        assert y.stride() == x.stride()
        results.append([y, *statistics, *torch.autograd.grad(y, leaves, upstream.to(device))])
    for plain, fused in zip(*results, strict=True):
        assert plain.dtype == fused.dtype
        tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
        terms = x.numel() / plain.numel()  # that a channel's sums are of, each rounded by itself
        torch.testing.assert_close(fused.cpu(), plain, rtol=tolerance, atol=tolerance * terms**0.5)


# --- over ranks -----------------------------------------------------------------------------------------------------


def step_of(world, norm: nn.Module, x: torch.Tensor, upstream: torch.Tensor, bounds: list[int]):
    """A training step on this rank's rows: output, gradients and running statistics."""
    rows = slice(bounds[world.rank], bounds[world.rank + 1])
    norm, x = synchronised(norm, world.group), x[rows].clone().requires_grad_()
    y = norm(x)
    y.backward(upstream[rows])
    buffers = [buffer.clone() for buffer in norm.buffers()]
    return y.detach(), x.grad, [parameter.grad for parameter in norm.parameters()], buffers


@SHAPES
@pytest.mark.parametrize("bounds", [[0, 3, 6], [0, 1, 6], [0, 2, 5, 6]], ids=str)
def test_ranks_are_one_process_with_all_rows(shape, bounds):
    norm, x, upstream = plain_norm(shape), values(shape), torch.randn(shape)
    found = run_ranks(len(bounds) - 1, step_of, norm, x, upstream, bounds)
    x.requires_grad_()
    y = norm(x)
    y.backward(upstream)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([rank[0] for rank in found]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([rank[1] for rank in found]), x.grad, **close)
    for number, parameter in enumerate(norm.parameters()):
        torch.testing.assert_close(sum(rank[2][number] for rank in found), parameter.grad, **close)
    for _, _, _, buffers in found:
        for ours, theirs, first in zip(buffers, norm.buffers(), found[0][3], strict=True):
            torch.testing.assert_close(ours, theirs, **close)
            assert torch.equal(ours, first)


def losses_of(world, network: nn.Module, batches: torch.Tensor):
    """SGD by DistributedDataParallel's rule, the ranks' mean, on this rank's half of every batch."""
    network = copy.deepcopy(network)
    sync_batch_norm(network, world.group)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for batch in batches:
        loss = network(batch.chunk(world.size)[world.rank]).sigmoid().square().mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in network.parameters():
            if world.group is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world.size
        optimizer.step()
    return network.state_dict()


def test_ranks_learn_what_one_process_learns(alone):
    convolution = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    network = nn.Sequential(*convolution, nn.Linear(36, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    batches = torch.randn(4, 8, 3, 5, 5)
    expected = losses_of(alone, network, batches)
    for state in run_ranks(2, losses_of, network, batches):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)


def statistics_of(world, x: torch.Tensor, bounds: list[int]):
    rows = slice(bounds[world.rank], bounds[world.rank + 1])
    y, statistics = normalise(x[rows], None, None, 1e-12, world.group)
    return y, *statistics


def test_a_huge_mean_does_not_swallow_the_variance():
    """Sums of squares would: they are 1e8, of which float32 keeps steps of 8, for a variance of 0.03.

    Means are rounded to steps of 0.001, of which the ranks' are 0.3 apart.
    """
    x = torch.randn(64, 5) * 0.1 + 1e4
    x[50:] += 0.3
    found = run_ranks(2, statistics_of, x, [0, 50, 64])
    for _, mean, variance, counts in found:
        torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=2e-7, atol=0)
        torch.testing.assert_close(variance.double(), x.double().var(0, correction=0), rtol=3e-2, atol=0)
        assert counts.tolist() == [50, 14]
    y = torch.cat([rank[0] for rank in found]).double()
    torch.testing.assert_close(y, F.batch_norm(x.double(), None, None, training=True, eps=1e-12), rtol=3e-2, atol=3e-2)


def collectives_of(world, x: torch.Tensor):
    """Names of those in a forward pass, and in the backward pass."""
    norm = synchronised(nn.BatchNorm1d(5), world.group)
    called = []

    def noted(name: str):
        original = getattr(dist, name)
        return lambda *args, **options: (called.append(name), original(*args, **options))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce"):
            patch.setattr(dist, name, noted(name))
        y = norm(x.clone().requires_grad_())
        forward = len(called)
        y.sum().backward()
    return called[:forward], called[forward:]


def test_one_collective_there_and_one_back():
    assert run_ranks(2, collectives_of, torch.randn(3, 5)) == [(["all_gather"], ["all_reduce"])] * 2


def running_statistics_of(world, batches: torch.Tensor, momentum: float | None):
    norm = synchronised(nn.BatchNorm1d(5, momentum=momentum), world.group)
    for batch in batches:
        norm(batch.chunk(world.size)[world.rank])
    before = [buffer.clone() for buffer in norm.buffers()]
    evaluated = norm.eval()(batches[0]).detach()
    return evaluated, before, list(norm.buffers())


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_are_pytorch_s(momentum):
    batches, norm = values((5, 8, 5)), nn.BatchNorm1d(5, momentum=momentum)
    for batch in batches:
        norm(batch)
    expected = norm.eval()(batches[0]).detach()
    for evaluated, before, after in run_ranks(2, running_statistics_of, batches, momentum):
        torch.testing.assert_close(evaluated, expected)
        for ours, still, theirs in zip(before, after, norm.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)
            assert torch.equal(ours, still)


# --- as a module ------------------------------------------------------------------------------------------------------


def test_parameters_and_state_stay():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(6)), nn.GroupNorm(2, 4))
    state, parameters = network.state_dict(), list(network.parameters())
    sync_batch_norm(network, None)
    assert isinstance(network[1], SyncBatchNorm)
    assert isinstance(network[1], nn.BatchNorm2d)
    assert isinstance(network[2][0], SyncBatchNorm)
    assert isinstance(network[2][0], nn.BatchNorm1d)
    assert type(network[3]) is nn.GroupNorm
    assert list(network.state_dict()) == list(state)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))


def copy_of(world, network: nn.Module, x: torch.Tensor):
    sync_batch_norm(network, world.group)
    duplicate = copy.deepcopy(network)
    assert duplicate[1].group is network[1].group is world.group
    assert duplicate[1].weight is not network[1].weight
    assert duplicate[1].running_mean is not network[1].running_mean
    before = duplicate[1].running_mean.clone()
    expected = network(x + world.rank)
    assert torch.equal(duplicate[1].running_mean, before)
    return expected.detach(), duplicate(x + world.rank).detach()


def test_a_copy_is_of_the_same_ranks():
    x = torch.randn(3, 4)
    for expected, found in run_ranks(2, copy_of, nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), x):
        assert torch.equal(found, expected)


def fold(world, encoder: nn.Module, images: torch.Tensor):
    encoder = copy.deepcopy(encoder)  # the other rank's lies in the same memory
    sync_batch_norm(encoder, world.group)
    encoder(images + world.rank)
    folded = fold_batch_norm(encoder)
    left = [part for part in folded.modules() if isinstance(part, SyncBatchNorm)]
    return len(left), folded(images).detach(), encoder.eval()(images).detach()


def test_it_folds_into_convolutions():
    torch.manual_seed(0)
    encoder, images = Encoder(ModelConfig(arch="cifar_resnet8", dim=8)), torch.randn(3, 3, 16, 16)
    for left, folded, expected in run_ranks(2, fold, encoder, images):
        assert left == 0
        torch.testing.assert_close(folded, expected, atol=2e-5, rtol=0)


def test_shapes_are_checked_as_by_the_norm_it_was_made_of(monkeypatch):
    monkeypatch.setattr(module, "normalise", None)
    norm = synchronised(nn.BatchNorm2d(3), group="some ranks")
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.randn(2, 3))
