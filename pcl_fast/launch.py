"""Start a command as several ranks on this machine.

    python -m pcl_fast.launch --nproc-per-node=G -m pcl_fast.train PRESET --data DIR --output DIR [--flags]

It takes the place of `torchrun --standalone`, whose store listens on all of the machine's addresses: here nothing
listens on any but the machine's own, 127.0.0.1. One output says why a run ended, that of the run.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from pcl_fast.command import command
from pcl_fast.errors import UserError

# When a rank has failed: how long the others may take to notice it by themselves and to end, and how long after a
# SIGTERM. On GPUs they notice nothing: a collective waits for the rank that is gone.
_SECONDS_TO_NOTICE = 10.0
_SECONDS_TO_END = 30.0
_SECONDS_BETWEEN_LOOKS = 0.05
# After a first signal, how long one that comes again may be impatience, or the terminal's and the launcher's both.
_SECONDS_OF_PATIENCE = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    parser = argparse.ArgumentParser(
        "pcl_fast.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc-per-node", type=int, required=True, metavar="G", help="ranks, one for each GPU")
    parser.add_argument("-m", "--module", action="store_true", help="the program is a module")
    parser.add_argument("program", help="what each rank runs with Python: a file, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the program's own")
    given = parser.parse_args()
    if given.nproc_per_node < 1:
        parser.error(f"--nproc-per-node must be 1 or more, not {given.nproc_per_node}")
    program = [*(["-m"] if given.module else []), given.program, *given.arguments]
    with command("pcl_fast.launch"):
        code = launch(program, given.nproc_per_node)
    sys.exit(code)


def launch(program: Sequence[str], ranks: int) -> int:
    """Run a Python program as so many ranks, and wait until all have ended. Signals are passed on to them: they save
    and end, however long that takes; the third signal, some seconds after the first, kills them. When one fails the
    others are ended too.

    Args:
        program: what follows `python` on a command line.
        ranks: they meet through a store that listens on 127.0.0.1, and exchange nothing over the network. Each gets an
            equal share of the processor's cores as threads, unless OMP_NUM_THREADS is set.

    Returns:
        0, or the exit code of the first rank that failed: 128 and the signal's number if a signal has ended it.

    Raises:
        UserError: nothing can be reached at 127.0.0.1.
    """
    _check_loopback()
    listening = socket.create_server(("127.0.0.1", 0), backlog=ranks)
    environment = _environment(listening.getsockname()[1], ranks)
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(ranks):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Not in the terminal's foreground group, or Ctrl-C would reach the loaders' processes as well.
            processes.append(subprocess.Popen([sys.executable, *program], env=own, start_new_session=True))
        with _Signals(processes) as signals:
            _store = _serve(listening)
            return _wait(processes, signals)
    finally:
        _kill(processes)
        for process in processes:
            process.wait()


def _check_loopback() -> None:
    """Ranks would try for minutes. A datagram's socket is connected without sending anything."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("127.0.0.1", 9))
        _loopback()
    except (OSError, StopIteration) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        raise UserError(
            f"the ranks cannot meet at 127.0.0.1{reason}: this machine, or this container, has no loopback interface "
            "that is up. Bring it up (ip link set lo up), or start the ranks with torchrun and another --master-addr"
        ) from error


def _loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _environment(port: int, ranks: int) -> dict[str, str]:
    """Return what all ranks find in their environment: where they meet, as torchrun says it."""
    loopback = _loopback()
    defaults = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        # PyTorch's word for: the launcher has the store, and no rank opens one.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PCL_FAST_LAUNCHER": str(os.getpid()),
    }
    return {**defaults, **os.environ, **told}


def _serve(listening: socket.socket) -> Any:
    """Return the store by which ranks meet, on a socket that listens already; it lives as long as it is referred to."""
    # While the ranks import PyTorch too, which takes seconds; their connections wait at the socket.
    from torch.distributed import TCPStore

    host, port = listening.getsockname()
    descriptor = listening.detach()
    # libuv takes no socket from its caller in PyTorch 2.5, which V100s need for its Triton.
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor, use_libuv=False)


class _Signals:
    """Passes signals on to the ranks while it is entered; one that is ignored (SIGHUP, under nohup) stays so.

    They save and end, unless one hangs, for whom the others wait. So a signal that comes again after some seconds is
    answered with what the next will do, and the next kills them all.

    killed_by: the number of the signal that has had them killed, or 0.
    """

    def __init__(self, ranks: Sequence[subprocess.Popen]) -> None:
        self.killed_by = 0
        self._ranks = ranks
        self._first: float | None = None
        self._warned = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._handlers = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in self._handlers:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self._warned:
            self.killed_by = number
            _kill(self._ranks)
            return
        for process in self._ranks:
            process.send_signal(number)
        if self._first is None:
            self._first = time.monotonic()
        elif time.monotonic() - self._first > _SECONDS_OF_PATIENCE:
            self._warn("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def _warn(self, name: str) -> None:
        left = [f"{rank}, process {process.pid}" for rank, process in enumerate(self._ranks) if process.poll() is None]
        if left:
            self._warned = True
            _say(
                f"not ended yet: rank {'; rank '.join(left)}. They may be saving. Another {name} kills them, and what "
                "was learned since the last checkpoint is lost"
            )


def _kill(processes: Sequence[subprocess.Popen]) -> None:
    """Kill the ranks that have not ended, and their loaders' processes, which are in the group of their rank."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _say(text: str) -> None:
    """Not by print, which cannot be used by what has interrupted a print."""
    os.write(sys.stderr.fileno(), f"pcl_fast.launch: {text}\n".encode())


def _wait(processes: Sequence[subprocess.Popen], signals: _Signals) -> int:
    """Wait for all ranks; return 0, or the code of the first that failed, or that of a signal that had them killed."""
    code, failed_at = 0, 0.0
    terminated = False
    while any(process.poll() is None for process in processes):
        if not code and not signals.killed_by:
            code, failed_at = _failure(processes), time.monotonic()
        waited = time.monotonic() - failed_at if code else 0.0
        if waited > _SECONDS_TO_NOTICE + _SECONDS_TO_END:
            break
        if waited > _SECONDS_TO_NOTICE and not terminated:
            terminated = True
            for process in processes:
                process.terminate()
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if signals.killed_by and not code:
        _say("the ranks were killed")
        return 128 + signals.killed_by
    return code or _failure(processes)


def _failure(processes: Sequence[subprocess.Popen]) -> int:
    """Return the exit code of a rank that has failed, or 0; say so where the rank itself could not."""
    for rank, process in enumerate(processes):
        code = process.poll() or 0
        if code < 0:
            # Python has names for but two of the real-time signals.
            name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
            reason = ", as by a system that is short of memory" if name == "SIGKILL" else ""
            _say(f"rank {rank}, process {process.pid}, was ended by {name}{reason}")
            return 128 - code
        if code:
            return code
    return 0


if __name__ == "__main__":
    main()
