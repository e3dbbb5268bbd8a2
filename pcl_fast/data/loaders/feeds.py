"""Two sources of the same batches that work at once: readers of a disk, and a helper that decodes where it is slow.

Both take the first batch that nobody has taken yet, and the batches are handed over in order. The helper begins when
they come late. When the readers overtake it, which shows that the disk is the faster way by far, it pauses.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing

import torch

# So many batches are read ahead, by so many threads: an SSD likes several requests at a time, but the more there are,
# the less the system's own reading ahead makes of them.
_AHEAD, _READERS = 4, 2
# So many more batches may be read ahead for each that is being decoded. A helper that decodes d batches a second, h at
# a time, takes h/d seconds for one, in which it takes h others and readers of r a second h r/d: when it has finished
# one, h (1 + r/d) <= 4 + 6 (h - 1) have been taken, for any h > 1, if r <= 4 d. Beyond that decoding would gain less
# than a quarter. They take memory: 34 batches of 64 at 224 px, of which DALI decodes 5 at a time, are 330 MB.
_PASSING = 6
# The helper begins when whoever wants the batches has waited for so many seconds of the pass. The first batch comes
# late from any disk, and where the rest is slower than reading, the cores have better to do.
_PATIENCE = 0.5


class Feeds:
    """Feeds yield the batches 0, 1, ..., count - 1 in order, once."""

    def __init__(
        self,
        count: int,
        read: Callable[[int], torch.Tensor],
        decode: Callable[[Iterator[int]], Iterator[torch.Tensor]] | None,
        on_fault: Callable[[Exception], None],
    ):
        """
        Args:
            read: returns the batch of this number; several threads call it.
            decode: yields the batches whose numbers it takes from an iterator, some of them ahead, until that ends;
                one thread calls it, perhaps several times. None: there is no helper.
            on_fault: is called, in that thread, with what `decode` has raised, or if the first batch that it makes is
                not the one that is read. After that the readers go on alone.
        """
        self.count, self.read, self.decode, self.on_fault = count, read, decode, on_fault
        self._changed = threading.Condition()
        self._given = self._taken = 0
        self._decoding: set[int] = set()
        self._returned: list[int] = []  # by a helper that has failed, the last one first
        self._ready: dict[int, torch.Tensor] = {}
        self._waited, self._patience = 0.0, _PATIENCE
        self._waiting = self._closed = False
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the batches.

        Raises:
            Exception: what `read` has raised.
        """
        jobs = [self._keep_reading] * _READERS + [self._help] * (self.decode is not None)
        threads = [threading.Thread(target=job, name="cache", daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            for _ in range(self.count):
                yield self._next()
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            for thread in threads:
                thread.join()

    def _next(self) -> torch.Tensor:
        begin = time.perf_counter()
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._given in self._ready or self._error)
            self._waiting = False
            if self._error:
                raise self._error
            self._waited += time.perf_counter() - begin
            batch = self._ready.pop(self._given)
            self._given += 1
            self._changed.notify_all()
        return batch

    def _put(self, number: int, batch: torch.Tensor) -> None:
        """Keep a batch, unless the other source was faster."""
        with self._changed:
            self._decoding.discard(number)
            if number >= self._given:
                self._ready.setdefault(number, batch)
            self._changed.notify_all()

    def _has_room(self) -> bool:
        ahead = _AHEAD + _PASSING * len(self._decoding)
        return self._taken < self.count and self._taken - self._given < ahead

    def _take(self) -> int:
        self._taken += 1
        return self._taken - 1

    # --- the readers ---

    def _keep_reading(self) -> None:
        try:
            while (number := self._to_read()) is not None:
                self._put(number, self.read(number))
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _to_read(self) -> int | None:
        """Wait for a batch to read; return None at the end."""
        with self._changed:
            while not self._closed and not self._error:
                if self._returned:
                    return self._returned.pop()
                if self._has_room():
                    return self._take()
                if self._waiting and self._given in self._decoding:
                    return self._overtake()
                self._changed.wait()
            return None

    def _overtake(self) -> int:
        """Return the batch that is waited for and being decoded: nothing else is left to be read."""
        self._decoding.discard(self._given)
        if self._taken < self.count:
            self._patience = max(self._patience, 2 * self._waited)
        return self._given

    # --- the helper ---

    def _help(self) -> None:
        checked = False
        try:
            while self._is_called():
                for number, batch in self._decoded():
                    if not checked:
                        self._check(number, batch)
                        checked = True
                    self._put(number, batch)
        except Exception as error:
            with self._changed:
                self._returned = sorted(self._decoding, reverse=True)
                self._decoding.clear()
                self._changed.notify_all()
            self.on_fault(error)

    def _check(self, number: int, decoded: torch.Tensor) -> None:
        if not torch.equal(decoded.cpu(), self.read(number)):
            raise ValueError("the images decode to other bytes than it holds; delete it if they were changed")

    def _is_called(self) -> bool:
        """Wait until help is needed; return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over() or (self._waiting and self._is_late()))
            return not self._is_over()

    def _is_over(self) -> bool:
        return self._closed or self._error is not None or self._taken == self.count

    def _is_late(self) -> bool:
        return self._waited >= self._patience and self._has_room() and self._given not in self._ready

    def _decoded(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield batches and their numbers for as long as there is room for them and they are not overtaken."""
        taken: deque[int] = deque()

        def numbers() -> Iterator[int]:
            while (number := self._to_decode()) is not None:
                taken.append(number)
                yield number

        with closing(self.decode(numbers())) as batches:
            for batch in batches:
                yield taken.popleft(), batch
                if self._closed or self._error:
                    return

    def _to_decode(self) -> int | None:
        with self._changed:
            if self._is_over() or not self._has_room() or self._waited < self._patience:
                return None
            number = self._take()
            self._decoding.add(number)
            self._changed.notify_all()
            return number
