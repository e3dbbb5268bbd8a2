"""How the kernels are launched: tiles from small tables, and the division of the banks among programs.

No autotuning: its first steps would be slow, and what it picks not reproducible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Tile:
    """Of `stream.stream` and `assign.sweep`: rows x columns at a time, by so many warps, loads so many stages ahead."""

    rows: int
    columns: int
    warps: int
    stages: int


# First compute capability -> bytes of an operand -> tiles for d up to 128, and for wider rows. For sm_70, sm_80 and
# sm_90 none of them spills registers, which the tests check. Stages are counted along the chain from a list's entry to
# the row that it names: 5 of them keep two tiles of rows in flight. Those of sm_80 fit into the 99 KB of shared memory
# of consumer GPUs, sm_120 included.
_SM80 = {2: (Tile(64, 64, 8, 5), Tile(64, 64, 8, 2)), 4: (Tile(16, 64, 8, 5), Tile(16, 64, 8, 2))}
TABLE: dict[int, dict[int, tuple[Tile, ...]]] = {
    70: {2: (Tile(64, 32, 8, 1),), 4: (Tile(32, 32, 8, 1),)},
    80: _SM80,
    90: {2: (Tile(64, 128, 4, 3), Tile(64, 128, 8, 2)), 4: (Tile(64, 32, 8, 5), Tile(16, 64, 8, 2))},
    120: _SM80,
}
# Of `assign.sweep`: first compute capability -> bytes of an entry of a point -> largest d -> tile. Chosen from compiled
# code (bench/results/NOTES.md): small enough for two programs on a multiprocessor, so that one multiplies while the
# other looks for maxima; only fp32 and d > 128 leave room for one on sm_90.
_NEAREST_SM80 = {
    2: {128: Tile(128, 64, 4, 2), 256: Tile(128, 64, 4, 2)},
    4: {128: Tile(64, 32, 4, 3), 256: Tile(32, 32, 4, 2)},
}
NEAREST: dict[int, dict[int, dict[int, Tile]]] = {
    70: {2: {128: Tile(64, 64, 4, 1)}, 4: {128: Tile(64, 32, 8, 1)}},
    80: _NEAREST_SM80,
    90: {
        2: {128: Tile(256, 64, 8, 3), 256: Tile(128, 64, 8, 3)},
        4: {128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 4, 2)},
    },
    100: {2: {128: Tile(128, 64, 8, 2), 256: Tile(128, 64, 8, 2)}, 4: {128: Tile(128, 64, 8, 2)}},
    120: _NEAREST_SM80,
}
BLOCK_D = 128  # the most entries of a row that a program of `stream` works on


def tile_for(capability: int, operand_bytes: int, d: int) -> Tile:
    """The tile of `stream.stream`."""
    return _newest(TABLE, capability)[operand_bytes][d > BLOCK_D]


def nearest_tile(capability: int, entry_bytes: int) -> dict[int, Tile]:
    """The tiles of `assign.sweep`: largest d -> tile."""
    return _newest(NEAREST, capability)[entry_bytes]


def _newest(table: dict, capability: int) -> dict:
    """The entry of the newest architecture in the table that is not newer than this one."""
    return table[max(entry for entry in table if entry <= capability)]


@lru_cache
def divide(columns: tuple[int, ...], tile_columns: int, programs: int) -> tuple[int, list[int]]:
    """Columns per part, and the number of parts of each bank: at most `programs` parts in all, but one a bank.

    Every bank is divided into parts of the same size, so the grid is even however different the banks are.
    """
    tiles = [math.ceil(count / tile_columns) for count in columns]
    size = max(1, math.ceil(sum(tiles) / programs))
    while sum(math.ceil(count / size) for count in tiles) > max(programs, len(tiles)):
        size += 1
    return size * tile_columns, [math.ceil(count / size) for count in tiles]


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU. For Triton's interpreter a small number that still divides the banks."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


@lru_cache
def capability(device: torch.device) -> int:
    """90 for sm_90, which the interpreter stands for too."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
