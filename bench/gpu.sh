#!/usr/bin/env bash
# Kernel tests, loss benchmarks and their plot, on a GPU machine that has torch, triton, pytest, pytest-benchmark and
# matplotlib; pcl_fast need not be installed. Everything is written to ${OUT:-bench/results}.
#
#     bench/gpu.sh [options of pytest, for the benchmarks: -k "not compile"]
set -euo pipefail
mkdir -p "${OUT:=$(dirname "$0")/results}"
out=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.."

options=(-o addopts=)  # pyproject.toml's are an error without pytest-benchmark
if ! python3 -c "import pcl_fast.kernels" 2>/dev/null; then
    # kernels/ is pcl_fast.kernels only once installed: give it that place in a copy, ahead of the working directory.
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    cp -r pcl_fast "$copy"
    ln -s "$PWD/kernels" "$copy/pcl_fast/kernels"
    export PYTHONPATH="$copy${PYTHONPATH:+:$PYTHONPATH}"
    options+=(-o "pythonpath=$copy tests bench")
fi

status=0
python3 -m pytest "${options[@]}" tests/kernels tests/test_losses.py -q 2>&1 | tee "$out/tests.log" || status=1

if ! python3 -c "import pytest_benchmark" 2>/dev/null; then
    echo "no benchmarks without pytest-benchmark: python3 -m pip install pytest-benchmark" >&2
    exit 1
fi
python3 -m pytest "${options[@]}" bench/loss.py --results="$out" \
    --benchmark-sort=name --benchmark-columns=min,median,max,rounds "$@" || status=1
# The record that this run wrote, among others that may lie there.
find "$out" -name loss.json -newer "$out/tests.log" -print0 | xargs -0rn1 python3 bench/plot.py || status=1
exit $status
