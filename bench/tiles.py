"""Times the search for the nearest centroid with every candidate tile, and prints the tiles, the fastest first, for the
table NEAREST in kernels/launch.py. This needs a GPU. What cannot be compiled or launched is listed with the reason.

    python bench/tiles.py [--dtype float16 float32] [--points 262144] [--clusters 25000] [--limit 240]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from functools import partial
from itertools import product
from unittest.mock import patch

import device
import torch
from clustered import TOLERANCE, mean_distance, some_points, unit_features
from pcl_fast.kernels import assign
from pcl_fast.kernels.launch import Tile

D = 128


def candidates() -> list[Tile]:
    """Return the tiles of which a thread holds 32 to 128 scores: fewer do not keep the matrix units busy, more do not
    fit into registers. Points held in registers are tried too.
    """
    held = [Tile(256, 64, 8, 3, held=True)]
    tiles = [Tile(*sizes) for sizes in product((64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4))]
    return held + [tile for tile in tiles if 32 <= tile.rows * tile.columns // (32 * tile.warps) <= 128]


def seconds_with(tile: Tile, features: torch.Tensor, centroids: torch.Tensor, expected: float) -> float:
    """Return how long all three launches take, in seconds, once they are compiled and have given the right result."""
    with patch.object(assign, "nearest_tile", lambda *_: {D: tile}):
        search = partial(assign.nearest, features, centroids)
        distance = mean_distance(features, centroids, search())
        if abs(distance - expected) > TOLERANCE * expected:
            raise ArithmeticError(f"mean distance {distance:.6f} instead of {expected:.6f}")
        return device.median_seconds(search, calls=3)


def sweep(tiles: Iterable[Tile], features: torch.Tensor, centroids: torch.Tensor, limit: float) -> None:
    """Try tiles for `limit` seconds, and print what was found."""
    flop = 2 * len(features) * len(centroids) * D
    expected = mean_distance(features, centroids)
    found, failed = [], []
    end = time.monotonic() + limit
    for tile in tiles:
        if time.monotonic() > end:
            failed.append((tile, "no time left"))
            continue
        try:
            found.append((seconds_with(tile, features, centroids, expected), tile))
        except Exception as error:  # the compiler's and the driver's, of many types
            failed.append((tile, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
    print(f"\n{features.dtype}, N={len(features)}, K={len(centroids)}\n{'TFLOP/s':>8}{'ms':>10}  tile")
    for seconds, tile in sorted(found, key=lambda entry: entry[0]):
        print(f"{flop / seconds / 1e12:8.1f}{1e3 * seconds:10.3f}  {tile}")
    for tile, reason in failed:
        print(f"{'-':>8}{'-':>10}  {tile}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float16", "float32"])
    parser.add_argument("--points", type=int, default=262_144)
    parser.add_argument("--clusters", type=int, default=25_000)
    parser.add_argument("--limit", type=float, default=240, help="seconds for each type")
    arguments = parser.parse_args()
    if not device.CUDA:
        parser.error("there is no GPU")
    print(f"{torch.cuda.get_device_name()}, matrix product {device.matmul_rate() / 1e12:.0f} TFLOP/s")
    for dtype in arguments.dtype:
        features = unit_features(arguments.points, arguments.clusters // 2, D, "cuda").to(getattr(torch, dtype))
        sweep(candidates(), features, some_points(features, arguments.clusters), arguments.limit)


if __name__ == "__main__":
    main()
