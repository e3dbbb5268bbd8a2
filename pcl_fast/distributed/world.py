"""What a process knows about the ranks of its run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process's rank, the number of ranks, the device that it computes on, and the process group of all ranks,
    which is None if there is only one.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes what the run leaves."""
        return self.rank == 0
