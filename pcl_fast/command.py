"""What all commands have in common: how they speak, and how they fail."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from pcl_fast.errors import UserError
from pcl_fast.files import in_the_way
from pcl_fast.garbage import pass_over_imports
from pcl_fast.interrupts import begin_command


@contextlib.contextmanager
def command(name: str) -> Iterator[None]:
    """Run a command in this context. A fault that its user can mend ends the process with one sentence, where a stack
    trace would hide what to do; and whatever happens to its output ends nothing, see `unfailing_output`.
    """
    with unfailing_output():
        begin_command()
        pass_over_imports()
        _refuse_empty(name)
        sys.unraisablehook = _quiet_about_loaders(sys.unraisablehook)
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(f"{name}: stopped")
        except OSError as error:
            sys.exit(f"{name}: {_of_a_file(error)}")
        except (ValueError, UserError) as error:
            sys.exit(f"{name}: {error}")
        except RuntimeError as error:
            if (sentence := _in_words(error)) is None:
                raise
            sys.exit(f"{name}: {sentence}")
        finally:
            # When a loader's process ends with this one, PyTorch's handler raises an error, and Python prints a trace.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _refuse_empty(name: str) -> None:
    """As a path it would be the current folder, and no argument of ours is meant to be empty."""
    for before, word in itertools.pairwise(sys.argv):
        if not word or (word.startswith("--") and word.endswith("=")):
            what = word.rstrip("=") or (before if before.startswith("--") else "an argument")
            sys.exit(f"{name}: {what} is empty; is it a variable of a script that has no value?")


def _quiet_about_loaders(show: Callable[[Any], None]) -> Callable[[Any], None]:
    """PyTorch raises an error wherever the program is when a loader's process ends by a signal. In a destructor nothing
    can be raised, and Python would print it: where the loader itself is ended, it matters to nobody.
    """

    def hook(lost: Any) -> None:
        if not str(lost.exc_value).startswith("DataLoader worker"):
            show(lost)

    return hook


def _of_a_file(error: OSError) -> str:
    """Name the file, and say what to do where it is in the way of another."""
    if error.filename is None or not (advice := in_the_way(error)):
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}{advice}"


def _in_words(error: RuntimeError) -> str | None:
    """Say what has happened to other processes, for which PyTorch has no types of error; None for a fault of ours."""
    text, last = str(error).strip(), str(error).strip().rpartition("\n")[2]
    if "unable to resize file </torch_" in text or "out of shared memory" in text:
        return (
            f"shared memory (/dev/shm) has no room for the images that other processes load ({last}). What was saved "
            "stands; make it larger (in a container by --shm-size), or use --data.workers 0, then go on"
        )
    if text.startswith("DataLoader worker"):
        return _of_a_loader(f"{error.__cause__}" if "killed by signal" in str(error.__cause__) else text)
    if asked := re.search(
        r"can't allocate memory: you tried to allocate (\d+) bytes|Tried to allocate ([\d.]+ \w+)", text
    ):
        size = asked[2] or f"{int(asked[1]) / 1e9:.1f} GB"
        return (
            f"there is no memory for {size} more. What was saved stands. --model.queue-size, --optim.batch-size, "
            "--data.size and --cluster.ks say how much is needed, on a GPU --data.decoder-mib too"
        )
    if "EADDRINUSE" in text:
        return (
            f"the ranks cannot meet: {text}. If the port is in use, choose another by torchrun's --master-port "
            "(MASTER_PORT)"
        )
    if type(error).__name__ not in ("DistBackendError", "DistNetworkError") and "gloo/transport" not in text:
        return None
    return f"another rank is gone, whose output says why; the last checkpoint stands ({text})"


def _of_a_loader(text: str) -> str:
    """Say why a process that loads images has ended, from PyTorch's words for it."""
    text = text.strip()
    signal_named = re.search(r"killed by signal: ([\w ]+)", text)
    if signal_named is None:
        reason, advice = "has ended, by a signal or for lack of memory", "if it ends again, use fewer --data.workers"
    elif signal_named[1] in ("Killed", "Bus error"):
        reason, advice = "was ended by the system, most likely for lack of memory", "use fewer --data.workers"
    else:
        reason, advice = f"was ended by a signal, {signal_named[1]}", "this run has not sent it"
    return (
        f"a process that loads images {reason} ({text}). What was saved stands. Go on with the same command; {advice}"
    )


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Let nothing fail that is printed in this context: not because the reader of a pipe (`| head`) or the terminal is
    gone, nor because the output's encoding lacks a character, which is written as an escape.
    """
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    try:
        for name, stream in before.items():
            setattr(sys, name, _unfailing(stream))
        yield
    finally:
        for name, stream in before.items():
            with contextlib.suppress(AttributeError, OSError, ValueError):
                getattr(sys, name).flush()
            setattr(sys, name, stream)


def _unfailing(stream: TextIO | None) -> TextIO | None:
    """Return an unfailing stream to where `stream` leads; itself if that is no file, which then cannot be lost."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    raw = io.BufferedWriter(_Unfailing(descriptor, "w", closefd=False))
    lines = stream.line_buffering
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors="backslashreplace", line_buffering=lines)


class _Unfailing(io.FileIO):
    """Drops what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes
