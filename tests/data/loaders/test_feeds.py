"""Two sources of the same batches: in order, each batch once, whatever becomes late or fails."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pcl_fast.data.loaders import feeds
from pcl_fast.data.loaders.feeds import Feeds

COUNT = 60


class Sources:
    """Readers of one disk and a decoder that is `ahead` batches ahead, which take so many seconds a batch."""

    def __init__(self, reading: float, decoding: float, ahead: int = 3, seed: int | None = None):
        self.times, self.ahead, self.rng = (reading, decoding), ahead, seed and np.random.default_rng(seed)
        self.read_numbers: list[int] = []
        self.decoded_numbers: list[int] = []
        self.faults: list[Exception] = []
        self.bouts = self.closed = 0
        self.disk = threading.Lock()

    def feeds(self, count: int = COUNT) -> Feeds:
        return Feeds(count, self.read, self.decode, self.faults.append)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds if self.rng is None else seconds * self.rng.uniform(0, 2))

    def read(self, number: int) -> torch.Tensor:
        with self.disk:
            self.sleep(self.times[0])
        self.read_numbers.append(number)
        return torch.tensor(number)

    def decode(self, numbers: Iterator[int]) -> Iterator[torch.Tensor]:
        self.bouts += 1
        held: list[int] = []
        try:
            while True:
                while len(held) < self.ahead and (number := next(numbers, None)) is not None:
                    held.append(number)
                if not held:
                    return
                self.sleep(self.times[1])
                self.decoded_numbers.append(held[0])
                yield torch.tensor(held.pop(0))
        finally:
            self.closed += 1


def taken(batches, pause: float = 0.0) -> list[int]:
    found = []
    for batch in batches:
        found.append(int(batch))
        time.sleep(pause)
    return found


def no_thread_is_left() -> bool:
    return not any(thread.name == "cache" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(feeds, "_PATIENCE", 0.0)


@pytest.mark.parametrize("seed", range(1, 9))
def test_batches_come_in_order_whoever_makes_them(seed):
    rng = np.random.default_rng(seed)
    sources = Sources(*rng.uniform(0, 0.004, 2), ahead=int(rng.integers(1, 6)), seed=seed)
    assert taken(sources.feeds(), pause=rng.uniform(0, 0.002)) == list(range(COUNT))
    assert set(sources.read_numbers) | set(sources.decoded_numbers) == set(range(COUNT))
    assert sources.closed == sources.bouts
    assert not sources.faults
    assert no_thread_is_left()


def test_both_work_at_once():
    """One disk of 100 batches a second and a decoder of 100: about as many from each, and hardly any from both."""
    sources = Sources(0.01, 0.01)
    assert taken(sources.feeds()) == list(range(COUNT))
    assert len(sources.read_numbers) + len(sources.decoded_numbers) <= COUNT + 10
    assert 0.2 * COUNT < len(sources.decoded_numbers) < 0.8 * COUNT


def test_a_fast_disk_overtakes_the_decoder_which_gives_way():
    sources = Sources(0.0005, 0.01)
    assert taken(sources.feeds(800)) == list(range(800))
    assert 1 <= len(sources.decoded_numbers) < 35  # it would be 60 if it did not pause


def test_nobody_decodes_for_whoever_is_slower_than_the_disk(monkeypatch):
    monkeypatch.setattr(feeds, "_PATIENCE", 0.5)
    sources = Sources(0.001, 0.001)
    assert taken(sources.feeds(), pause=0.003) == list(range(COUNT))
    assert sources.bouts == 0
    assert sorted(sources.read_numbers) == list(range(COUNT))


def test_few_batches_are_held():
    """A decoder that hangs until all readers wait: 4 batches, and 6 more for each of the 3 that it has."""
    sources, hangs = Sources(0.001, 0.0), threading.Event()
    sources.sleep = lambda seconds: hangs.wait() if seconds == 0.0 else time.sleep(seconds)
    batches = iter(sources.feeds())
    found = [int(next(batches))]
    time.sleep(0.1)
    assert len(sources.read_numbers) <= 4 + 6 * 3 + 2
    hangs.set()
    assert found + taken(batches) == list(range(COUNT))


def test_what_a_decoder_that_fails_had_taken_is_read():
    sources = Sources(0.003, 0.001)
    numbers_of, error = sources.decode, RuntimeError("broken")

    def failing(numbers):
        yield from itertools.islice(numbers_of(numbers), 4)  # fewer where others have had all turns on busy cores
        raise error

    sources.decode = failing
    assert taken(sources.feeds()) == list(range(COUNT))
    assert sources.faults == [error]
    assert sources.bouts == 1
    assert set(sources.read_numbers) >= set(range(COUNT)) - set(sources.decoded_numbers)


def test_a_decoder_of_other_batches_is_not_believed():
    sources = Sources(0.003, 0.001)
    decode = sources.decode
    sources.decode = lambda numbers: (batch + 1 for batch in decode(numbers))
    assert taken(sources.feeds()) == list(range(COUNT))
    assert ["other bytes" in str(fault) for fault in sources.faults] == [True]


def test_a_disk_that_fails_is_said_to_whoever_takes_the_batches():
    sources = Sources(0.002, 0.002)
    read = sources.read

    def failing(number):
        if number >= 20:
            raise OSError("gone")
        return read(number)

    sources.read = failing
    found, batches = [], iter(sources.feeds())
    with pytest.raises(OSError, match="gone"):
        found.extend(int(batch) for batch in batches)
    assert no_thread_is_left()
    assert sources.closed == sources.bouts
    assert not sources.faults


def test_a_pass_that_ends_early_leaves_no_thread():
    for steps in (1, 20):
        sources = Sources(0.003, 0.003)
        batches = iter(sources.feeds())
        assert [int(next(batches)) for _ in range(steps)] == list(range(steps))
        batches.close()
        assert no_thread_is_left()
        assert sources.closed == sources.bouts
