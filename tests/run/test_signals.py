"""Signals: noted, or ending what is not waited for."""

from __future__ import annotations

import os
import signal

import pytest

from pcl_fast.run.signals import Stopped, StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_afterwards_means_what_it_meant(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.asked
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert signals.asked
    assert signal.getsignal(number) is before


def test_in_some_work_a_signal_ends_it_once():
    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it goes on")

    with StopSignals() as signals:
        with pytest.raises(Stopped), signals.at_once():
            work()
        assert signals.asked
        os.kill(os.getpid(), signal.SIGTERM)  # outside of it, noted again


def test_a_signal_that_came_before_ends_it_at_its_beginning():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        done = []
        with pytest.raises(Stopped), signals.at_once():
            done.append(1)
        assert done == []


class SignalledMeanwhile(StopSignals):
    """A signal comes just after it was asked, for the first time, whether one has come."""

    noted = sent = False

    @property
    def asked(self) -> bool:
        noted = self.noted
        if not self.sent and self._handlers:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return noted

    @asked.setter
    def asked(self, value: bool) -> None:
        self.noted = value


def test_a_signal_at_the_beginning_of_the_work_is_not_missed():
    done = []
    with SignalledMeanwhile() as signals:
        with pytest.raises(Stopped), signals.at_once():
            done.append(1)
        assert signals.sent
    assert done == []


def test_after_the_work_a_signal_is_noted_again():
    with StopSignals() as signals:
        with signals.at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked
