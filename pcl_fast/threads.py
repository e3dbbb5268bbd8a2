"""How the threads wait that share an operation on a CPU: awake for some microseconds, then asleep."""

from __future__ import annotations

import os
import sys

from pcl_fast.interrupts import command_in

# Looks at the other thread, of some nanoseconds each. On two idle cores the demo trains as fast as with OpenMP's own
# 300,000, on two busy ones ten times as fast; with none at all it loses a quarter on idle cores.
_LOOKS = "1000"


def wait_asleep() -> None:
    """If this process is one of our commands, let OpenMP's threads (GNU's, which PyTorch has) sleep soon while they
    wait for each other, unless its environment says otherwise. It must be said before PyTorch is imported.

    By default they look again and again for a millisecond or more. Where another process wants the cores, they take
    them from the very thread that they wait for.
    """
    if command_in(sys.orig_argv) and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _LOOKS)
