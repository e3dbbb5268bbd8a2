"""Ctrl-C while a command still imports PyTorch, which takes seconds."""

from __future__ import annotations

import sys
from typing import Any


def end_quietly() -> None:
    """If this process is one of our commands (`python -m pcl_fast.train`), let an interrupt end it with a line, where
    Python would print the stack of whatever was being imported. Once the command runs, see `command`.
    """
    name = _module(sys.orig_argv)
    if not name.startswith("pcl_fast."):
        return
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"{name}: stopped", file=sys.stderr)
        else:
            show(kind, error, trace)

    sys.excepthook = hook


def _module(words: list[str]) -> str:
    """Return the module that Python was told to run, or ""."""
    after = words.index("-m") + 1 if "-m" in words else len(words)
    return words[after] if after < len(words) else ""
