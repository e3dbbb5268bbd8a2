"""Seeds for the many independent draws of a run, so that each depends on what it is for and nothing else."""

from __future__ import annotations

from enum import IntEnum


class Purpose(IntEnum):
    """What a draw is for: the part of its seed, behind the run's, that keeps it apart from all others."""

    SHUFFLE = 1
    NEGATIVES = 2
    ORDER = 3
    VIEWS = 4
    CLUSTERING = 5
    EVALUATION = 6


def check_seed(seed: int) -> None:
    """Refuse a seed that PyTorch's generators do not take.

    Raises:
        ValueError: it has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"--seed must fit into 64 bits, got {seed}")


def mix_seeds(*parts: int) -> int:
    """Hash of integers to 63 bits (splitmix64 steps), so that neighbouring epochs and steps draw unrelated numbers."""
    state = 0
    for part in parts:
        state = (state ^ part) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
