#!/usr/bin/env bash
# Tests of kernels and loaders, benchmarks and the loss's plot, on a GPU machine that has torch, triton, pytest,
# pytest-benchmark, matplotlib and scikit-learn, and what is to be tested or measured: faiss, and for the loaders DALI,
# torchvision, Pillow and tyro. pcl_fast need not be installed. Everything is written to ${OUT:-bench/results}.
#
#     bench/gpu.sh [tests] [loss] [kmeans] [estep] [data] [step] [tiles] [options of pytest, for the benchmarks]
#
# Without a part's name all but `tiles`. `step` ends with a profile. Each part is meant to end within ten minutes.
set -euo pipefail
mkdir -p "${OUT:=$(dirname "$0")/results}"
out=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.."

parts=" "
while [[ $# -gt 0 && $1 != -* ]]; do
    if [[ ! $1 =~ ^(tests|loss|kmeans|estep|data|step|tiles)$ ]]; then
        echo "no part is called \"$1\": tests, loss, kmeans, estep, data, step or tiles" >&2
        exit 2
    fi
    parts+="$1 "
    shift
done
[[ $parts != " " ]] || parts=" tests loss kmeans estep data step "

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
options=(-o addopts= --continue-on-collection-errors)  # pyproject.toml's are an error without pytest-benchmark
if ! python3 -c "import pcl_fast.kernels" 2>/dev/null; then
    # kernels/ is pcl_fast.kernels only once installed: give it that place in a copy, ahead of the working directory.
    cp -r pcl_fast "$scratch"
    ln -s "$PWD/kernels" "$scratch/pcl_fast/kernels"
    export PYTHONPATH="$scratch${PYTHONPATH:+:$PYTHONPATH}"
    options+=(-o "pythonpath=$scratch tests bench")
fi

status=0
if [[ $parts == *" tests "* ]]; then
    python3 -m pytest "${options[@]}" tests/kernels tests/clustering/test_kmeans.py \
        tests/clustering/test_concentration.py tests/losses tests/nn tests/test_learner.py \
        tests/run/test_metrics.py tests/data -q 2>&1 |
        tee "$out/tests.log" || status=1
fi
if [[ $parts == *" tiles "* ]]; then
    python3 bench/tiles.py 2>&1 | tee "$out/tiles.log" || status=1
fi

benchmarks=()
for name in loss kmeans estep data step; do
    [[ $parts != *" $name "* ]] || benchmarks+=("bench/$name.py")
done
[[ ${#benchmarks[@]} -gt 0 ]] || exit $status
if ! python3 -c "import pytest_benchmark" 2>/dev/null; then
    echo "no benchmarks without pytest-benchmark: python3 -m pip install pytest-benchmark" >&2
    exit 1
fi
touch "$scratch/started"
python3 -m pytest "${options[@]}" "${benchmarks[@]}" --results="$out" \
    --benchmark-sort=name --benchmark-columns=min,median,max,rounds "$@" || status=1
# The record that this run wrote, among others that may lie there.
find "$out" -name loss.json -newer "$scratch/started" -print0 | xargs -0rn1 python3 bench/plot.py || status=1
if [[ $parts == *" step "* ]]; then
    for record in "$out"/*/step.json; do
        [[ ! $record -nt $scratch/started ]] || python3 bench/profile_step.py --out "$(dirname "$record")" || status=1
    done
fi
exit $status
