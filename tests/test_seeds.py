"""Seeds of independent draws."""

from __future__ import annotations

import torch

from pcl_fast.data.loaders.order import EpochOrder
from pcl_fast.distributed import World
from pcl_fast.seeds import Purpose, mix_seeds


def test_mixed_seeds_are_63_bits_and_differ():
    seeds = {mix_seeds(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seeds(1, 2) != mix_seeds(2, 1)


def test_an_epoch_s_order_is_not_where_its_k_means_starts():
    """Both are permutations of all images; with one seed for the two, k-means would start from the first batches."""
    order = next(EpochOrder(5000, batch_size=200, seed=0, world=World(0, 1, torch.device("cpu"), None)).batches(20))
    seed = mix_seeds(0, Purpose.CLUSTERING, 20)
    start = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))[:200]
    assert len(set(order.tolist()) & set(start.tolist())) < 40


def test_purposes_are_apart():
    assert len({mix_seeds(0, purpose, 3) for purpose in Purpose}) == len(Purpose)
