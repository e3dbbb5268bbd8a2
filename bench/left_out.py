"""What needs a package that is not installed is left out and said, instead of failing.

Both for tests and for benchmarks: `pytest -p left_out --outcome FILE` writes what came out of the session as JSON:
passed, failed, skipped, and the missing packages with how many tests (or files of tests) each left out.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

# Packages by the modules that they bring, where the two have different names.
PACKAGES = {
    "PIL": "pillow", "sklearn": "scikit-learn", "nvidia": "nvidia-dali-cuda130 (on Volta nvidia-dali-cuda120)",
    "faiss": "faiss-gpu (on Volta faiss-gpu-cu12)", "pytest_benchmark": "pytest-benchmark",
    "flash_kmeans": "flash-kmeans", "cutlass": "nvidia-cutlass-dsl",
}  # fmt: skip
_ROOT = Path(__file__).parents[1]
_FOLDERS = [_ROOT, *(_ROOT / name for name in ("bench", "tests", "tests/kernels", "tests/losses"))]


def missing_module(text: str) -> str | None:
    """Return the last module that a trace says is missing, if it is another project's and really not installed."""
    named = re.findall(r"(?:ModuleNotFoundError|ImportError): No module named '([\w.]+)'", text)
    return named[-1] if named and not _is_ours(named[-1]) and not is_installed(named[-1]) else None


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def _is_ours(module: str) -> bool:
    top = module.partition(".")[0]
    return any((folder / top).is_dir() or (folder / f"{top}.py").is_file() for folder in _FOLDERS)


def package_of(module: str) -> str:
    """Return what to install for a module."""
    top = module.partition(".")[0]
    return PACKAGES.get(top, top)


def pytest_addoption(parser) -> None:
    parser.addoption("--outcome", type=Path, help="file for what came out of the session, as JSON")


def pytest_configure(config) -> None:
    config.pluginmanager.register(Watcher(config.getoption("--outcome")), "left out")


class Watcher:
    """Turns what lacks a package into what is skipped, and counts."""

    def __init__(self, path: Path | None):
        self.path, self.counts, self.missing = path, Counter(), Counter()

    def _leave_out(self, report, trace: str, where: Path) -> None:
        if report.failed and (module := missing_module(trace)):
            report.outcome, report.longrepr = (
                "skipped",
                (str(where), 0, f"Skipped: needs the package {package_of(module)}"),
            )

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        report = yield
        self._leave_out(report, str(report.longrepr), collector.path)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo is not None:
            self._leave_out(report, _said(call.excinfo.value), item.path)
        return report

    def pytest_collectreport(self, report) -> None:
        if report.outcome != "passed":
            self._count(report)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._count(report)

    def _count(self, report) -> None:
        self.counts[report.outcome] += 1
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if found := re.search(r"needs the package (.+)", reason):
            self.missing[found[1]] += 1

    def pytest_sessionfinish(self, exitstatus) -> None:
        if self.path:
            outcome = {**dict.fromkeys(("passed", "failed", "skipped"), 0), **self.counts, "missing": self.missing}
            self.path.write_text(json.dumps(outcome))


def _said(error: BaseException | None) -> str:
    """Return an exception and those that led to it, the first one last."""
    lines = []
    while error is not None:
        lines.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(lines)
