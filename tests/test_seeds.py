"""Seeds of independent draws."""

from __future__ import annotations

from pcl_fast.seeds import mix_seeds


def test_mixed_seeds_are_63_bits_and_differ():
    seeds = {mix_seeds(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seeds(1, 2) != mix_seeds(2, 1)
