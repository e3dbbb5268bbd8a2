"""Ranks do not outlive the launcher that started them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 1.0
# After a signal, for a rank that waits for another that is gone for ever.
_SECONDS_TO_END = 300.0


def end_with_launcher() -> None:
    """From now on, when the launcher of this rank is gone (killed with -9), treat that like a SIGTERM: save and end.
    Nobody else would end this rank, and the same command would meet it in the run's folder.

    A process that no launcher has started may outlive its parent: with nohup it is meant to.
    """
    if "LOCAL_RANK" in os.environ:
        # torchrun does not say which process it is.
        launcher = int(os.environ.get("PCL_FAST_LAUNCHER", os.getppid()))
        if launcher != os.getppid() and _is_alive(launcher):
            launcher = os.getppid()  # a rank has started this process, and handed its environment on
        threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()


def _is_alive(process: int) -> bool:
    """Whether it runs; one that has ended is listed until its parent has asked for its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if os.environ.get("RANK", "0") == "0":
        print(f"the launcher, process {launcher}, is gone: this run ends too", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_END)
    os.kill(os.getpid(), signal.SIGKILL)
