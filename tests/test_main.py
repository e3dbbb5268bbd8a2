"""All commands under one name."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import pcl_fast
from pcl_fast.__main__ import COMMANDS, main
from pcl_fast.command import command
from pcl_fast.garbage import wait_for_imports
from pcl_fast.interrupts import command_in
from pcl_fast.threads import wait_asleep

PACKAGE = Path(pcl_fast.__file__).parent


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pcl-fast", *words])
    main()


def test_every_command_is_in_the_list():
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__main__.py")]
    runnable = {file for file in files if '__name__ == "__main__"' in file.read_text()} - {PACKAGE / "__main__.py"}
    assert set(COMMANDS) == {file.parent.name if file.name == "__main__.py" else file.stem for file in runnable}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_them(words, monkeypatch, capsys):
    run(monkeypatch, *words)
    assert re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE) == list(COMMANDS)


def test_a_command_gets_the_rest(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "launch", "--nproc-per-node", "0", "x.py")
    assert ended.value.code == 2
    assert "pcl_fast.launch: error: --nproc-per-node must be 1 or more, not 0" in capsys.readouterr().err


def test_a_command_that_there_is_not(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "trian", "--help")
    assert ended.value.code == 2
    assert "there is no command 'trian'; choose from train, launch, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("python -m pcl_fast.train pcl_v2", "pcl_fast.train"),
        ("python -X importtime -m pcl_fast train pcl_v2", "pcl_fast.train"),
        ("python /usr/bin/pcl-fast train pcl_v2", "pcl_fast.train"),
        ("python /usr/bin/pcl-fast launch -m pcl_fast.train pcl_v2", "pcl_fast.launch"),
        ("python /usr/bin/pcl-fast", ""),
        ("python -m pcl_fast", ""),
        ("python -m pytest", ""),
        ("python script.py train", ""),
    ],
)
def test_an_interrupt_knows_the_command(words, name):
    assert command_in(words.split()) == name


@pytest.mark.parametrize(("name", "passed_over"), [("pcl_fast.train", True), ("pytest", False)])
def test_only_a_command_s_own_process_passes_over_imports(name, passed_over, monkeypatch):
    called = []
    for function in ("disable", "enable", "freeze"):
        monkeypatch.setattr(gc, function, partial(called.append, function))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", name])
    wait_for_imports()
    with command("x"):
        called.append("the command")
    expected = ["disable", "freeze", "enable", "the command"]
    assert called == (expected if passed_over else ["the command"])


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("pcl_fast.train", {}, {"GOMP_SPINCOUNT": "1000"}),
        ("pcl_fast.train", {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ("pcl_fast.train", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("pytest", {}, {}),
    ],
)
def test_only_a_command_s_own_threads_wait_asleep(name, before, after, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", name])
    monkeypatch.setattr(os, "environ", dict(before))
    wait_asleep()
    assert os.environ == after


def test_openmp_hears_of_it(tmp_path):
    """It must be said before PyTorch is imported: OpenMP shows what it has heard."""
    words = [sys.executable, "-m", "pcl_fast.embed", "--help"]
    done = subprocess.run(words, env={**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True)
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr


@pytest.mark.slow
def test_a_run_starts_without_what_only_its_end_needs():
    """Each takes tenths of a second and tens of megabytes, of every rank."""
    late = ("matplotlib", "pandas", "scipy.stats", "sklearn", "pcl_fast.planning")
    program = f"import sys, pcl_fast.train; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
