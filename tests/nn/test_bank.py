"""The bank of keys by itself, on one rank and on several. test_keys_as_features.py has what a run puts there."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from pcl_fast.distributed import World, shard_bounds
from pcl_fast.nn.bank import KeyBank

FEATURES = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0))


def fill(world: World, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The second time with other features; the whole bank, and this rank's shard."""
    bank = KeyBank(11, 4, dtype)
    for features in FEATURES:
        bank.fill(features[slice(*shard_bounds(11, world.rank, world.size))].to(dtype), world)
    return bank.keys, bank.shard(world)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shards_of_unequal_lengths_fill_the_bank_on_every_rank(alone, dtype):
    expected = FEATURES[1].to(dtype)
    for found in ([fill(alone, dtype)], run_ranks(2, fill, dtype)):
        assert all(torch.equal(whole, expected) for whole, _ in found)
        assert torch.equal(torch.cat([shard for _, shard in found]), expected)


def test_keys_replace_those_of_their_images_alone():
    bank = KeyBank(6, 4, torch.float16)
    bank.keys.fill_(0.5)
    keys = torch.randn(3, 4, requires_grad=True)
    bank.put(keys, torch.tensor([4, 0, 3]))
    assert torch.equal(bank.keys[[4, 0, 3]], keys.detach().half())
    assert torch.equal(bank.keys[[1, 2, 5]], torch.full((3, 4), 0.5, dtype=torch.float16))
    assert not bank.keys.requires_grad


def test_the_shard_is_the_bank_s_own_memory(alone):
    bank = KeyBank(6, 4, torch.float32)
    assert bank.shard(alone).data_ptr() == bank.keys.data_ptr()
    bank.put(torch.ones(1, 4), torch.tensor([2]))
    assert bank.shard(alone)[2].all()
