#!/usr/bin/env bash
# The first hour on a GPU machine: what GPU and stack, self-check of the kernels, tests, a few steps of a real run,
# benchmarks, profile, and a table of all that. torch, triton, pytest and pytest-benchmark are enough to begin with: what
# needs more says so and is left out. pcl_fast need not be installed. Everything is written to ${OUT:-bench/results}.
#
#     bench/gpu.sh [first-hour | PART ...] [--limit SECONDS] [options of pytest, for the benchmarks]
#
# Parts: gpu, self-check, tests, run, loss, kmeans, estep, data, slow_disk, decoding, features, step, profile, tiles,
# summary. Each takes ten minutes at most and can be repeated alone. Without a name it is first-hour: all but tiles.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
exec python3 "$here/first_hour.py" --out "${OUT:-$here/results}" "$@"
