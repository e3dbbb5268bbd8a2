"""What a benchmark measured stays in its record when a later run measures less."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import summary

BENCH = Path(__file__).parents[2] / "bench"
BENCHMARKS = """
import pytest
@pytest.mark.parametrize("case", ["small", "large"])
def bench_it(benchmark, case):
    benchmark.extra_info |= {"case": {}, "sizes": {}, "provider": "ours", "figures": {"run": RUN}}
    benchmark.group = case
    assert not (FAILS and case == "large")
    benchmark.pedantic(lambda: None, rounds=3)
"""


def measure(folder: Path, run: int, *options: str, fails: bool = False) -> dict:
    """Run the two benchmarks above; the record."""
    text = BENCHMARKS.replace("RUN", str(run)).replace("FAILS", str(fails))
    (folder / "it.py").write_text(text)
    line = [sys.executable, "-m", "pytest", "it.py", "-q", f"--results={folder / 'results'}", "-o", "addopts="]
    line += ["-o", "python_functions=bench_*", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    subprocess.run(line, cwd=folder, capture_output=True, env={"PYTHONPATH": str(BENCH), "PATH": "/usr/bin:/bin"})
    (path,) = (folder / "results").glob("*/it.json")
    record = json.loads(path.read_text())
    record["runs"] = {group: case["providers"]["ours"]["run"] for group, case in record["cases"].items()}
    return record


@pytest.mark.slow
def test_a_run_that_measures_less_leaves_the_other_figures(tmp_path):
    shutil.copy(BENCH / "conftest.py", tmp_path)
    assert measure(tmp_path, 1)["runs"] == {"small": 1, "large": 1}
    assert measure(tmp_path, 2, "-k", "small")["runs"] == {"small": 2, "large": 1}
    record = measure(tmp_path, 3, fails=True)
    assert record["runs"] == {"small": 3, "large": 1}
    assert "measured" not in record["cases"]["small"]
    when = record["cases"]["large"]["measured"]
    assert when == {"commit": record["commit"], "date": record["date"]}
    assert f"| large ({when['date']}, {when['commit']}) |" in summary.benchmark("it", record)
    assert measure(tmp_path, 4)["runs"] == {"small": 4, "large": 4}
