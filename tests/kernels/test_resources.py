"""The kernels compile for GPUs that need not be present, do not spill in loops, and use the matrix units as meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

RESULTS = Path(__file__).parents[2] / "bench" / "results"
# Triton 3.1 is the stack for Volta.
TARGETS = ("70",) if triton.__version__.startswith("3.1.") else ("80", "90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills_in_loops_and_use_the_matrix_units(target, tmp_path):
    script = Path(__file__).parent / "resources.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, target, "--record", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in (
        "stream fp16",
        "stream fp32",
        "sweep fp16 d=128",
        "sweep fp32 d=128",
        "sweep fp16 d=100",
        "add_segments",
        "jitter",
        "blur",
        "shift_and_scale fp16",
        "partial_statistics fp16",
        "normalise_rows fp16 + residual relu bits",
        "partial_sums fp16 relu bits fork",
        "differentiate_rows fp16 relu",
        "merge_statistics",
        "pool fp16 taps",
        "unpool fp16",
        "stack_blocks fp16",
        "unfold_filters fp16",
    ):
        assert f"sm_{target}  {kernel}" in done.stdout
    assert ("sweep_held" in done.stdout) == (target == "90")
    record = f"bounds-sm_{target}.json"
    assert json.loads((tmp_path / record).read_text()) == json.loads((RESULTS / record).read_text()), (
        f"bench/results/{record} is of other kernels: python tests/kernels/resources.py {target} --record bench/results"
    )
