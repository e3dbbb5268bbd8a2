"""Commands without the seconds that Python takes to import PyTorch: forked from a process that has done so.

What is forked is what a command line would start: the launcher, and ranks that run pcl_fast.train.main. PyTorch must
not have started any threads before.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from pcl_fast import launch, train

_FORK = multiprocessing.get_context("fork")


class Forked:
    """Takes the place of a subprocess.Popen of a Python process that trains."""

    def __init__(self, command: Sequence[str], env: dict[str, str], start_new_session: bool = True):
        """command: of which the arguments after `-m pcl_fast.train` are taken."""
        arguments = list(command[command.index("pcl_fast.train") :])

        def work() -> None:
            os.environ.clear()
            os.environ.update(env)
            sys.argv = arguments
            train.main()

        self._process = start(work)
        self.pid, self.returncode = self._process.pid, None

    def poll(self) -> int | None:
        self._process.join(0)
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self) -> int:
        self._process.join()
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(work: Callable[[], None]) -> multiprocessing.Process:
    """Run work() in a forked process with a session of its own, which ends as a command does."""

    def run() -> None:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        code: object = 0
        try:
            work()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
        # As at the end of a program, where nothing refers to what raised it any more.
        sys.exit(code)

    process = _FORK.Process(target=run)
    process.start()
    return process


def start_training(arguments: Sequence[str], *, ranks: int, said: Path) -> multiprocessing.Process:
    """Start `pcl_fast.train`, under the launcher if there are several ranks; what it says is appended to a file."""

    def work() -> None:
        with said.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        if ranks == 1:
            sys.argv = ["pcl_fast.train", *arguments]
            train.main()
        else:
            subprocess.Popen = Forked
            sys.argv = ["pcl_fast.launch", f"--nproc-per-node={ranks}", "-m", "pcl_fast.train", *arguments]
            launch.main()

    return start(work)
