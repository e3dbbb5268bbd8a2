"""The garbage collector does not look at what imports have made: half a million objects, which stay to the end.

It would, a few times while they are imported and once more when the process ends; that is seconds.
"""

from __future__ import annotations

import gc
import sys

from pcl_fast.interrupts import command_in


def wait_for_imports() -> None:
    """If this process is one of our commands, collect nothing until the command itself begins."""
    if command_in(sys.orig_argv):
        gc.disable()


def pass_over_imports() -> None:
    """If this process is one of our commands, collect again, but never what is there already. (In somebody else's,
    his own garbage would stay.)
    """
    if command_in(sys.orig_argv):
        gc.freeze()
        gc.enable()
