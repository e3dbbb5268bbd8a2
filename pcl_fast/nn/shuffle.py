"""Shuffled batches, in which batch norm normalises a key together with other images than its query.

If a key were normalised with the same images as its query, the batch's statistics would tell which key belongs to which
query, whatever the images show (He et al. 2020, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from pcl_fast.distributed import between_graphs

Restore = Callable[[torch.Tensor], torch.Tensor]


class BatchShuffle:
    """Exchanges a batch's rows among ranks and among the parts of their batches (see SplitBatchNorm), so that keys are
    normalised in other company than their queries.

    Every rank permutes its N rows and sends an equal share of them to each of the G ranks, itself included, in one
    all_to_all: N/G rows to each rank, instead of all rows to all. What arrives is dealt out to the parts like cards.
    """

    def __init__(self, rows: int, group: dist.ProcessGroup | None, splits: int = 1):
        """
        Args:
            rows: N, the batch of every rank.
            group: the ranks that exchange rows; None for this process alone.
            splits: the number of parts of every rank's batch, a divisor of N.
        """
        self.rows, self.splits, self.group = rows, splits, group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._sent = [_rows_sent(rows, self.rank, to, self.size) for to in range(self.size)]
        self._received = [_rows_sent(rows, source, self.rank, self.size) for source in range(self.size)]

    def order(self, seed: int) -> torch.Tensor | None:
        """Draw a permutation of this rank's rows for `begin`, int64 [N] on the CPU; None if there is only one part on
        one rank, and so nothing to shuffle.

        It is drawn on the host, so that all devices shuffle alike and a CUDA graph can be given another.
        """
        if self.size == self.splits == 1:
            return None
        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))

    def begin(self, rows: torch.Tensor, order: torch.Tensor | None) -> Callable[[], tuple[torch.Tensor, Restore]]:
        """Begin to exchange rows; other work may go on in the meantime.

        Args:
            rows: [N, ...] of any dtype.
            order: what `order` has drawn, on the device of the rows.

        Returns:
            A function that waits for the rows and returns (shuffled [N, ...], restore). The function restore takes
            results [N, ...] for the shuffled rows, sends them back, and returns those for this rank's own rows, in the
            rows' first order.
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
        """Give rows 0, S, 2S, ... to the first of S parts, rows 1, S + 1, ... to the second, and so on, so that every
        part has equally many rows of each rank.
        """
        return rows if self.splits == 1 else rows.unflatten(0, (-1, self.splits)).transpose(0, 1).flatten(0, 1)

    def _collect(self, rows: torch.Tensor) -> torch.Tensor:
        """Undo `_deal`."""
        return rows if self.splits == 1 else rows.unflatten(0, (self.splits, -1)).transpose(0, 1).flatten(0, 1)

    def _exchange(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> Callable[[], torch.Tensor]:
        """Begin an all_to_all of consecutive shares of the rows, and return a function that waits for what arrives.

        Rows travel as bytes, so that gloo and NCCL take any dtype.
        """
        if self.size == 1:
            return lambda: rows
        rows = rows.contiguous()
        result = torch.empty_like(rows)
        arriving, leaving = (each.view(self.rows, -1).view(torch.uint8) for each in (result, rows))
        under_way: list[dist.Work] = []

        def begin() -> None:
            work = dist.all_to_all_single(arriving, leaving, received, sent, group=self.group, async_op=True)
            under_way.append(work)

        def arrive() -> torch.Tensor:
            between_graphs(lambda: under_way.pop().wait())
            return result

        between_graphs(begin)

        return arrive


def _rows_sent(rows: int, source: int, to: int, size: int) -> int:
    """Return how many of its N rows rank `source` sends to rank `to`: N // G, and one more to each of the N mod G ranks
    after `source`.

    So every rank receives N rows too, and a batch of a single row goes to another rank.
    """
    return rows // size + ((to - source - 1) % size < rows % size)
