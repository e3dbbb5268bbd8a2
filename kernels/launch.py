"""How the kernels are launched: the size of their tiles, from small tables, and the division of banks among programs.

There is no autotuning: the first steps would be slow, and its choice would not be reproducible.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from pcl_fast.kernels.tiles import INTERPRETED


@dataclass(frozen=True)
class Tile:
    """How a program of `stream.stream` or `assign.sweep` works: on rows x columns scores at a time, with so many warps,
    and with loads that run so many pipeline stages ahead. `stream` divides its banks for so many programs on every
    multiprocessor. held: `assign_held.sweep_held` takes the place of `sweep` where it can be used.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int = 1
    held: bool = False


# Tiles of `stream.stream`: oldest compute capability -> bytes of an operand -> (tile for d up to 128, tile for wider
# rows). The tests check that none of them spills registers inside a loop on sm_70, sm_80 or sm_90, and that so many
# programs fit a multiprocessor. Stages are counted along the chain from an entry of the list to the row that it names:
# 5 stages keep two tiles of rows in flight. The tiles of sm_80 fit into the 99 KB of shared memory of consumer GPUs,
# sm_120 included.
_SM80 = {2: (Tile(64, 64, 8, 5), Tile(64, 64, 8, 2)), 4: (Tile(16, 64, 8, 5), Tile(16, 64, 8, 2))}
TABLE: dict[int, dict[int, tuple[Tile, ...]]] = {
    70: {2: (Tile(64, 32, 8, 1),), 4: (Tile(32, 32, 8, 1),)},
    80: _SM80,
    90: {2: (Tile(64, 128, 4, 3, programs=2), Tile(64, 128, 8, 2)), 4: (Tile(64, 32, 8, 5), Tile(16, 64, 8, 2))},
    120: _SM80,
}
# Tiles of `assign.sweep`: oldest compute capability -> bytes of an entry of a point -> largest d -> tile. They were
# chosen from compiled code (bench/results/NOTES.md), small enough for two programs on a multiprocessor, so that one
# multiplies while the other looks for maxima. On sm_90, fp32 and d > 128 leave room for one program only, and points
# held in registers need no second.
_NEAREST_SM80 = {
    2: {128: Tile(128, 64, 4, 2), 256: Tile(128, 64, 4, 2)},
    4: {128: Tile(64, 32, 4, 3), 256: Tile(32, 32, 4, 2)},
}
NEAREST: dict[int, dict[int, dict[int, Tile]]] = {
    70: {2: {128: Tile(64, 64, 4, 1)}, 4: {128: Tile(64, 32, 8, 1)}},
    80: _NEAREST_SM80,
    90: {
        2: {128: Tile(256, 64, 8, 3, held=True), 256: Tile(128, 64, 8, 3)},
        4: {128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 4, 2)},
    },
    100: {2: {128: Tile(128, 64, 8, 2), 256: Tile(128, 64, 8, 2)}, 4: {128: Tile(128, 64, 8, 2)}},
    120: _NEAREST_SM80,
}
BLOCK_D = 128  # how many entries of a row a program of `stream` works on at most


def tile_for(capability: int, operand_bytes: int, d: int) -> Tile:
    """Return the tile of `stream.stream`."""
    return _newest(TABLE, capability)[operand_bytes][d > BLOCK_D]


def nearest_tile(capability: int, entry_bytes: int) -> dict[int, Tile]:
    """Return the tiles of `assign.sweep`: largest d -> tile."""
    return _newest(NEAREST, capability)[entry_bytes]


def _newest(table: dict, capability: int) -> dict:
    """Return the entry of the newest architecture in the table that is no newer than this one."""
    return table[max(entry for entry in table if entry <= capability)]


@lru_cache
def divide(columns: tuple[int, ...], tile_columns: int, programs: int) -> tuple[int, list[int]]:
    """Divide banks of so many columns into parts: return the columns of a part, and each bank's number of parts.

    There are at most `programs` parts in all, but at least one a bank. Parts of all banks have the same size, so that
    all programs have equal work however different the banks are.
    """
    tiles = [math.ceil(count / tile_columns) for count in columns]
    size = max(1, math.ceil(sum(tiles) / programs))
    while sum(math.ceil(count / size) for count in tiles) > max(programs, len(tiles)):
        size += 1
    return size * tile_columns, [math.ceil(count / size) for count in tiles]


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors; for Triton's interpreter, a small one that still divides banks."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


@lru_cache
def capability(device: torch.device) -> int:
    """Return the compute capability as a number, 90 for sm_90. Triton's interpreter counts as sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def takes_activations(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether an encoder's kernels take activations of this type: GPUs before Ampere have no bf16."""
    known = dtype in (torch.float16, torch.bfloat16, torch.float32)
    return known and (INTERPRETED or device.type == "cuda") and (dtype != torch.bfloat16 or capability(device) >= 80)


def on(tensor: torch.Tensor) -> AbstractContextManager:
    """Return a context in which kernels are launched on the tensor's GPU, if it is on one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
