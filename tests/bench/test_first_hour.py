"""The first hour on a GPU: its parts, what is said of them, and that what is missing or hangs stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import first_hour
import machine
import pytest
import summary
import torch
from first_hour import FIRST_HOUR, Outcome, Part, Place, judge_script, judge_tests
from left_out import missing_module

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


@pytest.fixture
def place(tmp_path) -> Place:
    (tmp_path / "logs").mkdir()
    return Place(tmp_path, "a GPU", tmp_path / "a-gpu", "abc", {**os.environ, "PYTHONPATH": str(BENCH)}, ())


def run_part(monkeypatch, place: Place, command: tuple[str, ...], limit: float = 30) -> Outcome:
    monkeypatch.setitem(first_hour.PARTS, "loss", Part("", command))
    return first_hour.run("loss", place, limit, ())


def test_parts_and_options_of_pytest():
    arguments, options = first_hour.parse(["loss", "gpu", "-k", "float16", "--limit", "60"])
    assert (arguments.parts, options, arguments.limit) == (["gpu", "loss", "summary"], ["-k", "float16"], 60)
    assert first_hour.parse([])[0].parts == first_hour.parse(["first-hour"])[0].parts == list(FIRST_HOUR)
    assert "tiles" not in FIRST_HOUR


def test_a_part_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        first_hour.parse(["lost"])
    assert 'no part is called "lost"; there are gpu, self-check' in capsys.readouterr().err


def test_gpu_and_stack_are_told(monkeypatch):
    gpu = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(machine.device, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    found = machine.stack()
    assert (found["gpus"], found["capability"], found["memory_gib"], found["nccl"]) == (4, "sm_90", 80.0, "2.28.9")
    assert found["packages"]["pytest"] == pytest.__version__


def test_every_part_s_files_exist():
    words = [word for part in first_hour.PARTS.values() for word in part.command]
    assert all((ROOT / word).exists() for word in words if word.startswith(("bench/", "tests/")))


def test_gpu_sh_names_every_part():
    text = (BENCH / "gpu.sh").read_text()
    assert all(name in text for name in first_hour.PARTS)


@pytest.mark.parametrize(
    ("code", "counts", "expected"),
    [
        (0, {"passed": 3}, ("done", "3 passed")),
        (0, {"passed": 3, "missing": {"faiss-gpu": 2}}, ("done", "3 passed; left out for want of faiss-gpu (2)")),
        (5, {"missing": {"pillow": 1}}, ("left out", "needs pillow")),
        (5, {}, ("failed", "no test ran")),
        (1, {"passed": 3, "failed": 1}, ("failed", "1 failed, 3 passed")),
        # It crashed after all that had been counted.
        (-11, {"passed": 3}, ("failed", "0 failed, 3 passed")),
    ],
)
def test_what_is_said_of_tests(code, counts, expected):
    whole = {"passed": 0, "failed": 0, "missing": {}, **counts}
    assert judge_tests(code, whole) == expected


def test_what_is_said_of_scripts():
    assert judge_script(0, "fine") == ("done", "")
    missing = "Traceback\nModuleNotFoundError: No module named 'no_such_package'\n"
    assert judge_script(1, missing) == ("left out", "needs no_such_package")
    assert judge_script(1, missing + "other\n") == ("failed", "exit code 1: other")
    # A file of ours that is missing, and a package that is installed and lacks a part, are faults.
    for module in ("recipe", "pcl_fast.kernels", "torch"):
        assert missing_module(f"ModuleNotFoundError: No module named '{module}'") is None


def test_tests_without_their_packages_are_left_out_and_others_run(tmp_path):
    for name, text in {
        "test_file": "import no_such_package",
        "test_one": "def test_one():\n    import no_such_package\n\ndef test_two():\n    pass",
        "test_chain": (
            "def test_three():\n    try:\n        import no_such_package\n"
            "    except ImportError as error:\n        raise RuntimeError('install it') from error"
        ),
        "test_wrong": "def test_four():\n    assert False",
        "test_ours": "import pcl_fast.no_such_module",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    outcome = tmp_path / "outcome.json"
    words = ["-m", "pytest", "-q", "-p", "left_out", f"--outcome={outcome}", "--continue-on-collection-errors"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True)
    counts = json.loads(outcome.read_text())
    assert counts == {"passed": 1, "failed": 2, "skipped": 3, "missing": {"no_such_package": 3}}


def test_a_part_that_takes_too_long_may_write_what_it_has(monkeypatch, place):
    program = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written')"
    begin = time.monotonic()
    outcome = run_part(monkeypatch, place, ("-I", "-S", "-c", program), limit=1)
    assert outcome.outcome == "failed"
    assert "took more than 1 s" in outcome.why
    assert "written" in (place.out / "logs" / "loss.log").read_text()
    assert time.monotonic() - begin < 20


def test_a_part_that_does_not_end_is_killed_with_what_it_started(monkeypatch, place, tmp_path):
    monkeypatch.setattr(first_hour, "SECONDS_TO_END", 0.3)
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    program = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-I', '-S', '-c', {child!r}])\ntime.sleep(60)"
    )
    assert run_part(monkeypatch, place, ("-I", "-S", "-c", program), limit=1.5).outcome == "failed"
    number = int((place.out / "logs" / "loss.log").read_text())
    deadline = time.monotonic() + 10
    while is_alive(number):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(number: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{number}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_crash_is_a_failure(monkeypatch, place):
    outcome = run_part(monkeypatch, place, ("-c", "import os; print('before', flush=True); os.abort()"))
    assert outcome[:2] == ("failed", "exit code -6: before")


def test_without_pytest_benchmark_benchmarks_are_left_out(monkeypatch, place):
    monkeypatch.setattr(first_hour, "is_installed", lambda module: module != "pytest_benchmark")
    assert first_hour.run("loss", place, 1, ())[:2] == ("left out", "needs pytest-benchmark")


def test_parts_are_recorded_beside_those_of_earlier_runs_and_shown(place):
    first_hour.record(place, "gpu", Outcome("done", "", 2.0))
    first_hour.record(place, "loss", Outcome("failed", "1 failed", 3.0))
    first_hour.record(place, "loss", Outcome("done", "4 passed", 8.4))
    text = summary.summary(place.folder)
    assert "| gpu | done |  | 2 |" in text
    assert "| loss | done | 4 passed | 8 |" in text
    assert "1 failed" not in text


@pytest.mark.parametrize("folder", sorted(path for path in (BENCH / "results").iterdir() if path.is_dir()))
def test_all_records_are_shown(folder):
    def when(measured: dict) -> str:
        return " ({date}, {commit})".format(**measured["measured"]) if "measured" in measured else ""

    text = summary.summary(folder)
    for path in folder.glob("*.json"):
        for case, content in json.loads(path.read_text())["cases"].items():
            for provider, figures in content.get("providers", {}).items():
                first = f"{figures['median_ms']:,.4g} |" if "median_ms" in figures else ""
                assert f"| {case}{when(content)} | {provider}{when(figures)} | {first}" in text
