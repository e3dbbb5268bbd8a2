"""Shuffled batches: every key is normalised with other images than its query.

Were a key normalised with the same images as its query, the statistics of the batch would tell which belong together,
without a look at what they show (He et al. 2020, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

Restore = Callable[[torch.Tensor], torch.Tensor]


class BatchShuffle:
    """Exchanges a batch's rows among ranks and among the parts of their batches, so that no key is normalised with its
    own query's part.

    Every rank permutes its N rows and sends an even share of them to each rank by one all_to_all: N/G rows travel to
    each of the G ranks, instead of all rows to all. What arrives is dealt out to the parts like cards.
    """

    def __init__(self, rows: int, group: dist.ProcessGroup | None, splits: int = 1):
        """rows: N, the batch of every rank; splits: parts of it, a divisor of N."""
        self.rows, self.splits, self.group = rows, splits, group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._sent = [_rows_sent(rows, self.rank, to, self.size) for to in range(self.size)]
        self._received = [_rows_sent(rows, source, self.rank, self.size) for source in range(self.size)]

    def order(self, seed: int) -> torch.Tensor | None:
        """A permutation of this rank's rows for `begin`, int64 [N] on the CPU; None if there is nobody to shuffle with.

        Drawn on the host, so that every device shuffles alike and a captured step can be given another.
        """
        if self.size == self.splits == 1:
            return None
        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))

    def begin(self, rows: torch.Tensor, order: torch.Tensor | None) -> Callable[[], tuple[torch.Tensor, Restore]]:
        """Send rows on their way; other work may go on meanwhile.

        Args:
            rows: [N, ...] of any dtype.
            order: of `order`, beside the rows.

        Returns:
            A function to call when they are needed, for (shuffled [N, ...], restore): restore maps [N, ...] results
            for the shuffled rows to this rank's own rows in their first order.
        """
        if order is None:
            return lambda: (rows, lambda results: results)
        arrive = self._exchange(rows[order], self._sent, self._received)

        def finish() -> tuple[torch.Tensor, Restore]:
            return self._deal(arrive()), restore

        def restore(results: torch.Tensor) -> torch.Tensor:
            own = self._exchange(self._collect(results), self._received, self._sent)()
            return torch.empty_like(own).index_copy_(0, order, own)

        return finish

    def _deal(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows 0, S, 2S, ... to the first of S parts, and so on: each gets as many from every rank."""
        return rows if self.splits == 1 else rows.unflatten(0, (-1, self.splits)).transpose(0, 1).flatten(0, 1)

    def _collect(self, rows: torch.Tensor) -> torch.Tensor:
        """Undoes `_deal`."""
        return rows if self.splits == 1 else rows.unflatten(0, (self.splits, -1)).transpose(0, 1).flatten(0, 1)

    def _exchange(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> Callable[[], torch.Tensor]:
        """all_to_all of consecutive shares, as bytes: gloo and NCCL then take any dtype."""
        if self.size == 1:
            return lambda: rows
        rows = rows.contiguous()
        result = torch.empty_like(rows)
        work = dist.all_to_all_single(
            result.view(self.rows, -1).view(torch.uint8),
            rows.view(self.rows, -1).view(torch.uint8),
            received,
            sent,
            group=self.group,
            async_op=True,
        )

        def arrive() -> torch.Tensor:
            work.wait()
            return result

        return arrive


def _rows_sent(rows: int, source: int, to: int, size: int) -> int:
    """How many of its rows `source` sends to `to`: N/G, and one more to the N mod G ranks after `source`.

    Every rank then receives N rows too, and even single rows travel.
    """
    return rows // size + ((to - source - 1) % size < rows % size)
