"""The first hour on a GPU, in parts of at most ten minutes, each of which can be repeated alone. bench/gpu.sh calls it.

    python bench/first_hour.py [--out bench/results] [--limit 600] [first-hour | PART ...] [options of pytest]

Every part runs in a process of its own, so that a crash, or a GPU that takes no more work, ends that part alone. A part
that takes too long is interrupted; a benchmark then records what it has measured. A part whose packages are missing
says so and has not failed. What came of each is recorded in <out>/<machine>/first-hour.json and shown in summary.md
beside it; what the parts printed is in <out>/logs/. The options are the benchmarks'. The exit code is 1 if a part
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import NamedTuple

from left_out import is_installed, missing_module, package_of

HERE = Path(__file__).parent
SECONDS_TO_END = 30.0  # after an interrupt, for what was measured to be written
COLUMNS = ("--benchmark-sort=name", "--benchmark-columns=min,median,max,rounds")
TESTS = (
    "tests/kernels", "tests/clustering/test_kmeans.py", "tests/clustering/test_concentration.py", "tests/losses",
    "tests/nn", "tests/test_learner.py", "tests/test_captured.py", "tests/test_captured_ranks.py",
    "tests/run/test_self_check.py", "tests/run/test_metrics.py", "tests/data",
)  # fmt: skip


class Part(NamedTuple):
    """What it does, and what runs behind `python`; "{out}" and "{machine}" stand for the folders of records."""

    purpose: str
    command: tuple[str, ...]

    @property
    def is_pytest(self) -> bool:
        return self.command[:2] == ("-m", "pytest")

    @property
    def is_benchmark(self) -> bool:
        return self.is_pytest and self.command[2].startswith("bench/")


def _benchmark(name: str) -> tuple[str, ...]:
    return ("-m", "pytest", f"bench/{name}.py", "--results={out}", *COLUMNS)


PARTS = {
    "gpu": Part("what GPU and stack", ("bench/machine.py", "--out={out}")),
    "self-check": Part("kernels against their plain twins, as a run begins", ("bench/self_check.py",)),
    "tests": Part("tests of kernels, losses, clustering and loaders", ("-m", "pytest", *TESTS, "-q")),
    "run": Part("four steps of a real run, decoded by GPU and CPU", ("bench/two_steps.py", "--out={out}")),
    "loss": Part("the loss of a step", _benchmark("loss")),
    "kmeans": Part("k-means, an iteration", _benchmark("kmeans")),
    "estep": Part("the whole E-step", _benchmark("estep")),
    "data": Part("loaders", _benchmark("data")),
    "slow_disk": Part("a slow cache disk with the help of idle cores", _benchmark("slow_disk")),
    "decoding": Part("the DALI loader's stages", ("bench/decoding.py",)),
    "features": Part("the encoder's pass over the images", _benchmark("features")),
    "step": Part("a training step", _benchmark("step")),
    "profile": Part("where a step spends its time", ("bench/profile_step.py", "--out={machine}")),
    "tiles": Part("tiles of the nearest-centroid kernel", ("bench/tiles.py",)),
    "summary": Part("the table of all records", ("bench/summary.py", "{machine}")),
}
FIRST_HOUR = tuple(name for name in PARTS if name != "tiles")


class Outcome(NamedTuple):
    """outcome: "done", "failed" or "left out"; why: in words, if there is something to say."""

    outcome: str
    why: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.outcome}{f' ({self.why})' if self.why else ''}, {self.seconds:.0f} s"


class Place(NamedTuple):
    """Where parts run and write. out: folder of all records; machine: its name; folder: of its records; environment: of
    the parts; options: pytest's.
    """

    out: Path
    machine: str
    folder: Path
    commit: str
    environment: dict[str, str]
    options: tuple[str, ...]


def main() -> int:
    arguments, options = parse(sys.argv[1:])
    out = arguments.out.resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    os.chdir(HERE.parent)
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="pcl_fast-") as scratch:
        place = find_place(out, Path(scratch))
        place.folder.mkdir(exist_ok=True)
        for name in arguments.parts:
            print(f"\n=== {name}: {PARTS[name].purpose}", flush=True)
            outcomes[name] = run(name, place, arguments.limit, options)
            print(f"=== {name}: {outcomes[name]}", flush=True)
            record(place, name, outcomes[name])
    print("", *(f"{name:12} {outcome}" for name, outcome in outcomes.items()), sep="\n")
    return int(any(outcome.outcome == "failed" for outcome in outcomes.values()))


def find_place(out: Path, scratch: Path) -> Place:
    """kernels/ is pcl_fast.kernels only once installed: where it is not, give it that place in a copy, ahead of the
    working directory.
    """
    paths, options = [str(HERE)], ()
    if not is_installed("pcl_fast.kernels"):
        shutil.copytree(HERE.parent / "pcl_fast", scratch / "pcl_fast")
        (scratch / "pcl_fast" / "kernels").symlink_to(HERE.parent / "kernels")
        paths, options = [str(scratch), str(HERE)], ("-o", f"pythonpath={scratch} tests bench")
    given = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([given] if given else [])])}
    # Not in this process, which would keep some of the GPU's memory.
    program = "import machine; print(machine.name(), machine.slug(), machine.commit(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    machine, slug, commit = done.stdout.splitlines()[-3:]
    return Place(out, machine, out / slug, commit, environment, options)


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return our arguments, and pytest's options."""
    parser = argparse.ArgumentParser(
        "bench/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the records")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a part may take")
    arguments, rest = parser.parse_known_args(words)
    first_option = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    parts, options = rest[:first_option], rest[first_option:]
    for word in parts:
        if word not in (*PARTS, "first-hour"):
            parser.error(f'no part is called "{word}"; there are {", ".join(PARTS)}, and first-hour for all but tiles')
    asked = {name for word in parts for name in (FIRST_HOUR if word == "first-hour" else (word,))}
    # However few, the summary shows what came of them.
    arguments.parts = [name for name in PARTS if name in asked | {"summary"}] if asked else list(FIRST_HOUR)
    return arguments, options


def run(name: str, place: Place, limit: float, options: Sequence[str]) -> Outcome:
    """Run a part and say what came of it."""
    part = PARTS[name]
    needed = (("pytest", part.is_pytest), ("pytest_benchmark", part.is_benchmark))
    if missing := [package_of(module) for module, needs in needed if needs and not is_installed(module)]:
        return Outcome("left out", f"needs {', '.join(missing)}", 0.0)
    command = [word.format(out=place.out, machine=place.folder) for word in part.command]
    log, counts = (place.out / "logs" / f"{name}.{kind}" for kind in ("log", "json"))
    counts.unlink(missing_ok=True)
    if part.is_pytest:
        # addopts of pyproject.toml are an error without pytest-benchmark.
        command += ["-p", "left_out", f"--outcome={counts}", "-o", "addopts=", "--continue-on-collection-errors"]
        command += [*place.options, *(options if part.is_benchmark else ())]
    begin = time.monotonic()
    code, timed_out = execute([sys.executable, *command], log, limit, place.environment)
    seconds = round(time.monotonic() - begin, 1)
    if timed_out:
        return Outcome("failed", f"took more than {limit:.0f} s; records hold what was measured by then", seconds)
    if counts.is_file():
        return Outcome(*judge_tests(code, json.loads(counts.read_text())), seconds)
    return Outcome(*judge_script(code, log.read_text()), seconds)


def judge_tests(code: int, counts: dict) -> tuple[str, str]:
    """Return (outcome, why) of a session of pytest, from its exit code and from what left_out.py counted."""
    missing = ", ".join(f"{package} ({number})" for package, number in sorted(counts["missing"].items()))
    needs = f"left out for want of {missing}" if missing else ""
    # 5: no test ran.
    if counts["failed"] or code not in (0, 5):
        return "failed", f"{counts['failed']} failed, {counts['passed']} passed{'; ' if needs else ''}{needs}"
    if not counts["passed"]:
        return ("left out", f"needs {', '.join(sorted(counts['missing']))}") if missing else ("failed", "no test ran")
    return "done", f"{counts['passed']} passed{'; ' if needs else ''}{needs}"


def judge_script(code: int, printed: str) -> tuple[str, str]:
    """Return (outcome, why) of a script, from its exit code and from what it printed."""
    if code == 0:
        return "done", ""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    last = lines[-1] if lines else "it printed nothing"
    if (module := missing_module(last)) is not None:
        return "left out", f"needs {package_of(module)}"
    return "failed", f"exit code {code}: {last[:200]}"


def execute(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> tuple[int, bool]:
    """Run a command, show what it prints and keep it in `log`. After `limit` seconds it is interrupted, and if that
    does not end it, it is killed with all that it started.

    Returns:
        Its exit code, and whether it took too long.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=_show, args=(process, log), daemon=True)
    reader.start()
    timed_out = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        timed_out = True
        _end(process)
    except KeyboardInterrupt:
        _end(process)
        raise
    reader.join(5)  # a process that a crashed part left behind may hold the pipe
    return process.returncode, timed_out


def _show(process: subprocess.Popen, log: Path) -> None:
    with log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            print(line, end="", flush=True)


def _end(process: subprocess.Popen) -> None:
    """The group's number is its first process', which start_new_session has made."""
    for number, seconds in ((signal.SIGINT, SECONDS_TO_END), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def record(place: Place, name: str, outcome: Outcome) -> None:
    """Write what came of a part beside what came of the others, today or earlier."""
    path = place.folder / "first-hour.json"
    cases = json.loads(path.read_text())["cases"] if path.is_file() else {}
    cases[name] = {"date": date.today().isoformat(), "commit": place.commit, **outcome._asdict()}
    place.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": place.machine, "cases": cases}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
