"""Writes <results>/<machine>/<module>.json after a benchmark run: medians, percentiles, rates and ratios."""

from __future__ import annotations

import json
import statistics
from datetime import date
from pathlib import Path

import device
import machine
import pytest

_RATIO = "times_faster_than_first"
_passed: set[str] = set()


def pytest_addoption(parser) -> None:
    parser.addoption("--results", type=Path, default=machine.HERE / "results", help="folder of the benchmarks' records")


@pytest.fixture(scope="session", autouse=True)
def described() -> tuple[dict, str]:
    """Describe the machine before any benchmark runs, because one that fails can leave the GPU unusable."""
    return machine.describe()


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" and report.passed:
        _passed.add(report.nodeid)


def pytest_sessionfinish(session) -> None:
    by_module: dict[str, list] = {}
    for benchmark in session.config._benchmarksession.benchmarks:
        # One that was interrupted has fewer rounds, and not all of its figures.
        if benchmark.stats.data and benchmark.fullname in _passed:
            by_module.setdefault(Path(benchmark.fullname.split("::")[0]).stem, []).append(benchmark)
    for module, entries in by_module.items():
        found, slug = machine.describe()
        folder = session.config.getoption("results") / slug
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "commit": machine.commit(),
            "date": date.today().isoformat(),
            **found,
            **entries[0].extra_info.get("versions", {}),
            "sizes": entries[0].extra_info["sizes"],
            "cases": cases(entries, found),
        }
        path = folder / f"{module}.json"
        if path.is_file() and not is_complete(session):
            record["cases"] = with_earlier(record["cases"], json.loads(path.read_text()))
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"\nwritten: {path}")
        for group, case in record["cases"].items():
            for provider, row in case["providers"].items():
                print(f"  {group}, {provider}: {row['median_ms']} ms, {row.get(_RATIO, '-')}x")


def is_complete(session) -> bool:
    """Return whether all benchmarks ran: none was left out by an option, failed, or was interrupted."""
    option = session.config.option
    chosen = option.keyword or option.markexpr or option.deselect or any("::" in word for word in option.file_or_dir)
    return not chosen and session.exitstatus == pytest.ExitCode.OK


def with_earlier(now: dict[str, dict], before: dict) -> dict[str, dict]:
    """Return the cases and providers that were measured now, and those of an earlier record that were not, which say
    when they were.

    before: the record.
    """
    when = {"commit": before["commit"], "date": before["date"]}
    earlier = {group: {"measured": when, **case} for group, case in before["cases"].items()}
    order = [*earlier, *(group for group in now if group not in earlier)]
    return {
        group: _with_providers(now[group], earlier.get(group)) if group in now else earlier[group] for group in order
    }


def _with_providers(case: dict, before: dict | None) -> dict:
    """Add a case's earlier providers, in their order. What was measured now is compared with the first of them only if
    that ran too.
    """
    if before is None:
        return case
    earlier, now = before["providers"], case["providers"]
    if next(iter(earlier)) not in now:
        now = {name: {key: row[key] for key in row if key != _RATIO} for name, row in now.items()}
    kept = {name: {"measured": before["measured"], **row} for name, row in earlier.items()}
    return {**case, "providers": kept | now}


def cases(entries: list, found: dict) -> dict[str, dict]:
    """Return, for every group, its case and its providers' figures, in the order in which they ran."""
    result: dict[str, dict] = {}
    for entry in entries:
        case = entry.extra_info["case"]
        if entry.group not in result:
            floor = {"floor_ms": floor_ms(case, found)} if "floor_bytes" in case else {}
            result[entry.group] = {**case, **floor, "providers": {}}
        providers = result[entry.group]["providers"]
        first = next(iter(providers.values()))["median_ms"] if providers else None
        providers[entry.extra_info["provider"]] = figures(entry, found, first)
    return result


def figures(entry, found: dict, first_ms: float | None) -> dict:
    """Return a provider's figures: times in ms, how many times faster it is than the group's first provider, rates of
    the work that the case names, memory, and what the benchmark itself has found out.
    """
    times = sorted(1e3 * seconds for seconds in entry.stats.data)
    median = statistics.median(times)
    rates = {"gb_per_s": ("floor_bytes", 1e6), "tflop_per_s": ("flop", 1e9)}
    case = entry.extra_info["case"]
    return {
        "median_ms": round(median, 4),
        "p20_ms": round(times[len(times) // 5], 4),
        "p80_ms": round(times[len(times) * 4 // 5], 4),
        "rounds": len(times),
        _RATIO: round((first_ms or median) / median, 2),
        **{rate: round(case[work] / unit / median, 3) for rate, (work, unit) in rates.items() if work in case},
        **share_of_matmul(case, found, median),
        "peak_extra_bytes": entry.extra_info.get("peak_extra_bytes"),
        **entry.extra_info.get("figures", {}),
    }


def share_of_matmul(case: dict, found: dict, ms: float) -> dict[str, float]:
    """Return the share of the rate of PyTorch's matrix product, if that and not memory is the floor; nothing on a CPU,
    whose rate is not measured.
    """
    if not device.CUDA or "flop" not in case or "floor_bytes" in case:
        return {}
    return {"share_of_matmul": round(case["flop"] / 1e9 / ms / found["matmul_tflop_per_s"], 3)}


def floor_ms(case: dict, found: dict) -> float | None:
    """Return how long the GPU takes to copy the case's bytes, in ms; None on a CPU, whose rate is not measured."""
    return round(case["floor_bytes"] / found["copy_gb_per_s"] / 1e6, 5) if device.CUDA else None
