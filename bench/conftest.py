"""Writes bench/results/<machine>/<module>.json after a benchmark run: medians, percentiles and ratios."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def pytest_sessionfinish(session) -> None:
    benchmarks = getattr(session.config._benchmarksession, "benchmarks", [])
    by_module: dict[str, list] = {}
    for benchmark in benchmarks:
        if benchmark.stats.rounds:
            by_module.setdefault(Path(benchmark.fullname.split("::")[0]).stem, []).append(benchmark)
    for module, entries in by_module.items():
        machine, slug = describe_machine()
        folder = RESULTS / slug
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "commit": commit(),
            "date": date.today().isoformat(),
            **machine,
            "sizes": entries[0].extra_info["sizes"],
            "cases": cases(entries),
        }
        path = folder / f"{module}.json"
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"\nwritten: {path}")
        for group, providers in record["cases"].items():
            for provider, figures in providers.items():
                print(f"  {group}, {provider}: {figures['median_ms']} ms, {figures['times_faster_than_first']}x")


def cases(entries: list) -> dict[str, dict]:
    """group -> provider -> figures in ms; the ratio is against the group's first provider."""
    result: dict[str, dict] = {}
    for entry in entries:
        times = sorted(1e3 * seconds for seconds in entry.stats.data)
        group = result.setdefault(entry.group, {})
        median = statistics.median(times)
        first = next(iter(group.values()))["median_ms"] if group else round(median, 3)
        group[entry.extra_info["provider"]] = {
            "median_ms": round(median, 3),
            "p20_ms": round(times[len(times) // 5], 3),
            "p80_ms": round(times[len(times) * 4 // 5], 3),
            "rounds": len(times),
            "times_faster_than_first": round(first / median, 2),
        }
    return result


def describe_machine() -> tuple[dict, str]:
    """What the figures depend on, and a folder name for it."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor()} CPU, {torch.get_num_threads()} threads"
    machine = {
        "machine": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
    }
    return machine, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def processor() -> str:
    """The processor's model, where the system tells."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def commit() -> str:
    """Short hash, with a mark if the tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip()
