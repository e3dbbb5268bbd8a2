"""Ctrl-C while a command still imports PyTorch, which takes seconds."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

# The console script, whose first argument is the command: `pcl-fast train`.
SCRIPT = "pcl-fast"


def end_quietly() -> None:
    """If this process is one of our commands (`python -m pcl_fast.train`, `pcl-fast train`), let an interrupt end it
    with a line until the command itself begins, see `begin_command`. Python would raise KeyboardInterrupt in whatever
    is being imported, which prints a stack, or may catch it and go on.
    """
    name = command_in(sys.orig_argv)
    if not name or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # it is ignored, as in the background of a script

    def end(number: int, frame: Any) -> None:
        os.write(2, f"{name}: stopped\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    end.is_ours = True
    signal.signal(signal.SIGINT, end)


def begin_command() -> None:
    """From now on an interrupt raises KeyboardInterrupt again."""
    if hasattr(signal.getsignal(signal.SIGINT), "is_ours"):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def command_in(words: list[str]) -> str:
    """Return which of our commands Python was told to run, "pcl_fast.train", by itself or by the script; or ""."""
    if len(words) > 2 and os.path.basename(words[1]) == SCRIPT:
        return f"pcl_fast.{words[2]}"
    after = words.index("-m") + 1 if "-m" in words else len(words)
    module = words[after : after + 1]
    name = ".".join(words[after : after + 2] if module == ["pcl_fast"] else module)
    return name if name.startswith("pcl_fast.") else ""
