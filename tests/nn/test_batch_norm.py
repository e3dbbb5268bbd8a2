"""Batch norm over parts of a batch and folded into convolutions, its averaged statistics, and shuffled batches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from pcl_fast.config import ModelConfig
from pcl_fast.nn.batch_norm import SplitBatchNorm, average_statistics, fold_batch_norm, split_batch_norm
from pcl_fast.nn.encoder import Encoder
from pcl_fast.nn.shuffle import BatchShuffle


def trained_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm whose parameters and statistics are not those of a new one."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    return norm


def split_copy(norm: nn.BatchNorm2d, splits: int) -> nn.BatchNorm2d:
    module = nn.Sequential(nn.BatchNorm2d(norm.num_features))
    split_batch_norm(module, splits)
    module[0].load_state_dict(norm.state_dict())
    return module[0]


@pytest.mark.parametrize("splits", [2, 3, 6])
def test_every_part_is_normalised_by_itself(splits):
    """The result is that of so many ranks, each with a copy, whose statistics are then averaged."""
    norm, x = trained_norm(5), torch.randn(6, 5, 4, 3) * torch.rand(6, 1, 1, 1) + torch.randn(6, 1, 1, 1)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    split, upstream = split_copy(norm, splits), torch.randn(6, 5, 4, 3)
    copies = [split_copy(norm, 1) for _ in range(splits)]
    expected = torch.cat([copy(part) for copy, part in zip(copies, x.chunk(splits), strict=True)])
    found = split(x)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.autograd.grad(expected, x, upstream)[0]
    torch.testing.assert_close(torch.autograd.grad(found, [x, split.weight], upstream)[0], wanted)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(copy, name) for copy in copies]).mean(0)
        torch.testing.assert_close(getattr(split, name), mean)
        assert not torch.equal(mean, getattr(norm, name))
    assert split.num_batches_tracked == 1


def test_in_eval_mode_parts_do_not_matter():
    norm, x = trained_norm(3).eval(), torch.randn(5, 3, 2, 2)
    assert torch.equal(split_copy(norm, 4).eval()(x), norm(x))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch of 5 does not divide into 2 parts"):
        split_copy(trained_norm(3), 2)(torch.randn(5, 3, 2, 2))


def encoder(**options) -> Encoder:
    """Return an encoder that has seen images, and so has statistics."""
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(dim=16, **options))
    encoder(torch.randn(6, 3, 32, 32) + 0.5)
    return encoder


@pytest.mark.parametrize(
    ("options", "splits"),
    [
        ({"arch": "resnet18", "small_stem": True}, 1),
        ({"arch": "resnet50", "head": "mlp"}, 1),
        ({"arch": "cifar_resnet14"}, 1),
        ({"arch": "cifar_resnet14"}, 3),
    ],
    ids=str,
)
def test_folded_batch_norm_computes_the_same_features(options, splits):
    """The encoder itself stays as it was: in training mode, with its own weights and statistics."""
    original = encoder(**options, bn_splits=splits)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    folded = fold_batch_norm(original)
    images = torch.randn(2, 3, 32, 32)
    found = folded(images)
    assert original.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, SplitBatchNorm) for module in original.modules()) == (splits > 1)
    torch.testing.assert_close(found, original.eval()(images), atol=2e-5, rtol=0)


# --- shuffling ------------------------------------------------------------------------------------------------------


def shuffle(exchange: BatchShuffle, rows: torch.Tensor, seed: int):
    return exchange.begin(rows, exchange.order(seed))()


def shuffle_there_and_back(world, rows: int, splits: int):
    batch = torch.arange(rows * 3 * 2, dtype=torch.uint8).view(rows, 3, 2) + 100 * world.rank
    owner = torch.full((rows, 1), world.rank)
    exchange = BatchShuffle(rows, world.group, splits)
    shuffled, restore = shuffle(exchange, batch, seed=world.rank)
    others = [shuffle(exchange, batch, seed=10 * number + world.rank)[0] for number in range(1, 5)]
    owners, _ = shuffle(exchange, owner, seed=world.rank)
    results = shuffled.double().mean((1, 2))[:, None] + torch.tensor([0.0, 0.5])
    return batch, shuffled, restore(shuffled), restore(results), owners, others


@pytest.mark.parametrize(("size", "rows", "splits"), [(2, 8, 1), (2, 5, 1), (2, 1, 1), (3, 7, 1), (2, 8, 2), (3, 6, 3)])
def test_shuffle_mixes_and_restore_undoes_it(size, rows, splits):
    ranks = run_ranks(size, shuffle_there_and_back, rows, splits)
    for rank, (batch, shuffled, restored, results, owners, others) in enumerate(ranks):
        assert torch.equal(restored, batch)
        torch.testing.assert_close(results, batch.double().mean((1, 2))[:, None] + torch.tensor([0.0, 0.5]))
        assert shuffled.shape == batch.shape
        # Every part of a rank's batch has nearly equally many rows of every rank.
        for part in owners.view(-1).chunk(splits):
            counts = torch.bincount(part, minlength=size)
            assert counts.max() - counts.min() <= 1
        if rows > 1:
            assert any(not torch.equal(other, shuffled) for other in others)
        else:
            assert owners.item() != rank
    everything = sorted(row.tolist() for result in ranks for row in result[1].flatten(1))
    assert everything == sorted(row.tolist() for result in ranks for row in result[0].flatten(1))


def test_one_rank_shuffles_among_its_parts():
    rows, exchange = torch.arange(12)[:, None], BatchShuffle(12, None, splits=3)
    mixed = 0
    for seed in range(20):
        shuffled, restore = shuffle(exchange, rows, seed)
        assert sorted(shuffled.view(-1).tolist()) == list(range(12))
        assert torch.equal(restore(shuffled), rows)
        mixed += sum(len({int(row) // 4 for row in part}) > 1 for part in shuffled.chunk(3))
    assert mixed > 50  # of 60 parts; by chance 1 in 55 has rows of one part alone


def test_one_rank_of_one_part_has_nobody_to_shuffle_with():
    rows, exchange = torch.arange(4)[:, None], BatchShuffle(4, None)
    assert exchange.order(0) is None
    shuffled, restore = shuffle(exchange, rows, 0)
    assert shuffled is rows
    assert restore(rows) is rows


def bytes_received(world, shape: tuple[int, ...], dim: int) -> tuple[int, int]:
    """Return the bytes that this rank receives from others: images and keys in our exchange, and all ranks' images when
    they are gathered as floats.
    """
    received = []
    all_to_all, all_gather = dist.all_to_all_single, dist.all_gather

    def counted_exchange(output, rows, output_splits, input_splits, **options):
        elsewhere = sum(count for rank, count in enumerate(output_splits) if rank != world.rank)
        received.append(elsewhere * output[0].nbytes)
        return all_to_all(output, rows, output_splits, input_splits, **options)

    def counted_gather(outputs, rows, **options):
        received.append(sum(output.nbytes for rank, output in enumerate(outputs) if rank != world.rank))
        return all_gather(outputs, rows, **options)

    dist.all_to_all_single, dist.all_gather = counted_exchange, counted_gather
    try:
        images = torch.zeros(shape, dtype=torch.uint8)
        shuffled, restore = shuffle(BatchShuffle(len(images), world.group), images, seed=world.rank)
        (ours,) = received
        restore(shuffled.new_zeros(len(images), dim, dtype=torch.float16))
        keys = received[1]
        floats = images.permute(0, 3, 1, 2).float()
        dist.all_gather([torch.empty_like(floats) for _ in range(world.size)], floats)
        return ours, keys, received[2]
    finally:
        dist.all_to_all_single, dist.all_gather = all_to_all, all_gather


@pytest.mark.parametrize("size", [2, 3])
def test_4_times_the_ranks_fewer_bytes_than_gathering_floats(size):
    """On G ranks the official code gathers (G - 1) N images of floats; ours receives (G - 1) N / G images of bytes."""
    for ours, keys, gathered in run_ranks(size, bytes_received, (6, 20, 20, 3), 16):
        assert gathered == 4 * size * ours
        assert gathered >= 8 * ours
        assert keys == ours // (20 * 20 * 3) * 16 * 2


def statistics_of(world):
    norm = nn.BatchNorm1d(2)
    norm.running_mean += world.rank
    norm.running_var += 2 * world.rank
    average_statistics(norm, world.group)
    return norm.running_mean, norm.running_var


def test_statistics_are_averaged():
    for mean, var in run_ranks(2, statistics_of):
        assert mean.tolist() == [0.5, 0.5]
        assert var.tolist() == [2, 2]
