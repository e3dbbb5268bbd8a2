"""How the threads wait that share an operation on a CPU: asleep."""

from __future__ import annotations

import os
import sys

from pcl_fast.interrupts import command_in


def wait_asleep() -> None:
    """If this process is one of our commands, let OpenMP's threads sleep while they wait for each other, unless
    OMP_WAIT_POLICY says otherwise. It must be said before PyTorch is imported.

    By default they look again and again for some milliseconds. Where another process wants the cores they take them
    from the very thread that they wait for: two threads on two busy cores trained the demo at a tenth of the speed.
    """
    if command_in(sys.orig_argv):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
