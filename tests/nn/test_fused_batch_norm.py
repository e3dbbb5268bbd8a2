"""Rewritten ResNets against the modules that they were: outputs, gradients, state, what is left to the modules.

The operation is the kernels' plain twin, or the kernels on a GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
from pcl_fast.kernels import batch_norm_plain
from ranks import run_ranks
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from pcl_fast.config import ModelConfig
from pcl_fast.nn import fused_batch_norm as module
from pcl_fast.nn.batch_norm import fold_batch_norm, split_batch_norm
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.fused_batch_norm import fuse_batch_norm, unfuse_batch_norm
from pcl_fast.nn.momentum import momentum_copy
from pcl_fast.nn.sync_batch_norm import sync_batch_norm


class Counted:
    """The plain operation, and what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, *parameters, **options):
        self.calls.append(options)
        return batch_norm_plain.batch_norm_act(x, *parameters, **options)

    def count(self, **options) -> int:
        return sum(all(bool(call[name]) is value for name, value in options.items()) for call in self.calls)


@pytest.fixture
def operation(monkeypatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(module, "_kernels", lambda x: counted)
    return counted


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    torch.manual_seed(0)


def small_resnet() -> ResNet:
    """torchvision's, with two blocks in each of two layers only, and few channels."""
    network = ResNet(BasicBlock, [2, 2, 1, 1], num_classes=5)
    return _narrow(network)


def _narrow(network: ResNet) -> ResNet:
    """A quarter of the channels: the same code in a fraction of the time."""
    for part in network.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.Conv2d):
                inputs = 3 if child.in_channels == 3 else child.in_channels // 8
                sizes = child.kernel_size, child.stride, child.padding
                setattr(part, name, nn.Conv2d(inputs, child.out_channels // 8, *sizes, bias=False))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(part, name, nn.BatchNorm2d(child.num_features // 8))
    network.fc = nn.Linear(network.fc.in_features // 8, 5)
    return network


def networks() -> dict[str, nn.Module]:
    head = {"dim": 8, "head": "linear"}
    return {
        "torchvision": small_resnet(),
        "bottleneck": _narrow(ResNet(module.Bottleneck, [2, 1, 1, 1])),
        "cifar": Encoder(ModelConfig(arch="cifar_resnet14", **head)),
    }


# Batch norms; those with a residual; those of the last whose output goes to another block.
COUNTS = {"torchvision": (16, 6, 5), "bottleneck": (20, 5, 4), "cifar": (15, 6, 5)}


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32).double().to(memory_format=torch.channels_last)


def randomised(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    tensor.uniform_(0.5, 1.5)
    return network.double().to(memory_format=torch.channels_last)


def step(network: nn.Module, x: torch.Tensor, upstream: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Output, gradients of the images and of all parameters, and buffers after a training step."""
    x = x.clone().requires_grad_()
    y = network(x)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) if upstream is None else upstream
    gradients = torch.autograd.grad(y, [x, *network.parameters()], upstream)
    return [y.detach(), *gradients, *network.buffers()]


def assert_alike(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", COUNTS)
def test_it_computes_what_the_modules_do(name, operation):
    network = randomised(networks()[name])
    fused = copy.deepcopy(network)
    norms, residuals, forks = COUNTS[name]
    assert fuse_batch_norm(fused) == norms
    assert list(fused.state_dict()) == list(network.state_dict())
    x = images()
    assert_alike(step(fused, x), step(network, x))
    assert len(operation.calls) == norms
    assert operation.count(relu=False) == norms - operation.count(relu=True)
    downsamples = sum(isinstance(part, nn.Sequential) and len(part) == 2 and isinstance(part[0], nn.Conv2d)
                      for part in network.modules())  # fmt: skip
    assert operation.count(relu=False) == downsamples
    found = [call["residual"] is not None for call in operation.calls]
    assert sum(found) == residuals
    assert operation.count(fork=True) == forks
    # Evaluation has the running statistics, and no gradient.
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), network.eval()(x))
    unfuse_batch_norm(fused)
    assert [type(part) for part in fused.modules()] == [type(part) for part in network.modules()]
    assert_alike(step(fused.train(), x), step(network.train(), x))
    assert len(operation.calls) == 2 * norms


def test_the_momentum_encoder_keeps_nothing(operation, monkeypatch):
    """No bits, and no graph, while its running statistics move as they do in eager mode."""
    kept = []
    plain = batch_norm_plain.OPERATIONS.apply
    noted = batch_norm_plain.OPERATIONS._replace(apply=lambda *given: (kept.append(given[-1]), plain(*given))[1])
    monkeypatch.setattr(batch_norm_plain, "OPERATIONS", noted)
    network, x = randomised(small_resnet()), images()
    fused = copy.deepcopy(network)
    fuse_batch_norm(fused)
    momentum = momentum_copy(fused)
    with torch.no_grad():
        torch.testing.assert_close(momentum(x), network(x))
    assert len(kept) == 16
    assert not any(kept)
    for ours, theirs in zip(momentum.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parts_of_a_batch(operation):
    network = randomised(small_resnet())
    split_batch_norm(network, 2)
    fused = copy.deepcopy(network)
    fuse_batch_norm(fused)
    x = images(6)
    assert_alike(step(fused, x), step(network, x))
    assert operation.count(training=True) == 16
    with pytest.raises(ValueError, match="batch of 3 does not divide into 2 parts"):
        fused(x[:3])


def step_of_rank(world, network: nn.Module, x: torch.Tensor, upstream: torch.Tensor, bounds: list[int]):
    rows = slice(bounds[world.rank], bounds[world.rank + 1])
    network = copy.deepcopy(network)  # the ranks share memory
    sync_batch_norm(network, world.group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_kernels", lambda x: batch_norm_plain.batch_norm_act)
        return step(network, x[rows], upstream[rows])


def test_ranks_are_one_process_with_all_rows():
    network, x, upstream = randomised(small_resnet()), images(6), torch.randn(6, 5).double()
    fused = copy.deepcopy(network)
    fuse_batch_norm(fused)
    expected = step(network, x, upstream)
    first, second = run_ranks(2, step_of_rank, fused, x, upstream, [0, 2, 6])
    count = len(list(network.parameters()))
    assert_alike([torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])], expected[:2])
    sums = [a + b for a, b in zip(first[2 : 2 + count], second[2 : 2 + count], strict=True)]
    assert_alike([*sums, *first[2 + count :]], expected[2:])
    assert all(torch.equal(a, b) for a, b in zip(first[2 + count :], second[2 + count :], strict=True))


def test_on_a_cpu_the_modules_do_it_to_the_bit():
    network, x = randomised(small_resnet()).float(), images().float()
    fused = copy.deepcopy(network)
    fuse_batch_norm(fused)
    for ours, theirs in zip(step(fused, x), step(network, x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("hooked", ["bn1", "relu", "layer1.0.bn2", "layer1.1.relu"])
def test_hooks_are_called(hooked, operation):
    network, seen = small_resnet().to(memory_format=torch.channels_last), []
    fuse_batch_norm(network)
    network.get_submodule(hooked).register_forward_hook(lambda *given: seen.append(given))
    network(images().float())
    assert len(seen) == (2 if hooked == "layer1.1.relu" else 1)
    assert len(operation.calls) == 16 - len(seen)


@pytest.mark.parametrize("case", ["contiguous", "no affine", "cumulative average", "another activation"])
def test_what_the_kernels_do_not_take_is_left_to_the_modules(case, operation):
    block = BasicBlock(8, 8)
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    if case == "contiguous":
        x, block.conv1 = x.contiguous(), nn.Identity()
    elif case == "no affine":
        block.bn1 = nn.BatchNorm2d(8, affine=False)
    elif case == "cumulative average":
        block.bn1.momentum = None
    else:
        block.relu = nn.SiLU()
    fused = copy.deepcopy(block)
    assert fuse_batch_norm(fused) == 2
    torch.testing.assert_close(fused(x), block(x))
    assert len(operation.calls) == (0 if case in ("contiguous", "another activation") else 1)


def test_folded_and_copied(operation):
    network, x = randomised(networks()["cifar"]), images()
    network(x)
    fused = copy.deepcopy(network)
    fuse_batch_norm(fused)
    with torch.no_grad():
        torch.testing.assert_close(fold_batch_norm(fused)(x), fold_batch_norm(network)(x))
    assert not operation.calls


def test_without_patterns_nothing_is_done():
    for network in (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()),
        ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=lambda width: nn.GroupNorm(2, width)),
    ):
        types = [type(part) for part in network.modules()]
        assert fuse_batch_norm(network) == 0
        assert [type(part) for part in network.modules()] == types


def test_another_forward_is_left_alone():
    class Maps(ResNet):
        """Its user wants what is between the layers."""

    network = Maps(BasicBlock, [1, 1, 1, 1])
    fuse_batch_norm(network)
    assert type(network) is Maps
    assert not any(getattr(part, "forks", False) for part in network.modules())


def test_one_value_a_channel_is_refused(operation):
    network = small_resnet().to(memory_format=torch.channels_last)
    fuse_batch_norm(network)
    with pytest.raises(ValueError, match="at least two values of each channel"):
        network(images(1).float())


def test_maps_between_blocks_in_eval_mode(operation):
    network = small_resnet().to(memory_format=torch.channels_last).eval()
    fuse_batch_norm(network)
    seen = []
    network.layer1[0].register_forward_hook(lambda block, given, out: seen.append(out))
    with torch.no_grad():
        network(images().float())
    assert isinstance(seen[0], torch.Tensor)
