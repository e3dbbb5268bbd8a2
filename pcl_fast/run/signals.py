"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(BaseException):
    """A signal asked to stop where nothing new is to be saved.

    Not an Exception, which code that reads images would turn into the image's fault.
    """


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGHUP (the terminal is gone) while it is entered, instead of ending the process. A
    SIGHUP that is ignored stays so: nohup wants the run to go on.

    asked: whether one has come. All ranks are told by the next reduction of the metrics.
    """

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        _noted.update(numbers)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        _noted.clear()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In this context a signal ends the work by raising Stopped, and so does one that has come before: for work
        that takes longer than a launcher waits, and after which there would be nothing new to save.
        """
        # In this order: a signal that comes between the two is not missed.
        self._at_once = True
        try:
            with _quiet_where_nothing_can_be_raised():
                if self.asked:
                    raise Stopped
                yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: Any) -> None:
        """May be called again and again: a launcher passes on what the terminal has already sent."""
        if not self.asked and not self._at_once and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(
                    2, f"{signal.Signals(number).name}: what is under way ends first, then all is saved\n".encode()
                )
        self.asked = True
        if self._at_once:
            self._at_once = False
            raise Stopped


# The signals that a StopSignals notes now.
_noted: set[int] = set()


def _forget_in_child() -> None:
    """In a process that was forked meanwhile, to load images, a signal means what it does to any process. Nothing else
    is early enough: it may come before the first line of that process's own.
    """
    for number in _noted:
        signal.signal(number, signal.SIG_DFL)
    _noted.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def _quiet_where_nothing_can_be_raised() -> Iterator[None]:
    """In a hook that runs when a process forks, Python prints what is raised and goes on. The signal has been noted."""
    before = sys.unraisablehook

    def show(lost: Any) -> None:
        if not issubclass(lost.exc_type, Stopped):
            before(lost)

    sys.unraisablehook = show
    try:
        yield
    finally:
        sys.unraisablehook = before
