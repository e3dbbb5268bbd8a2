"""The ranks of a run: connecting.py (who they are), collectives.py (what they compute together), agreement.py (what
they must agree on), gpu.py (whether this machine's GPU can be used)."""

from pcl_fast.distributed.agreement import all_or_none, check_same, gather_objects, main_first
from pcl_fast.distributed.collectives import (
    all_gather_rows,
    all_gather_shards,
    all_reduce_sum,
    begin_all_reduce_sum,
    begin_to_read,
    shard_bounds,
    shard_lengths,
)
from pcl_fast.distributed.connecting import connect, disconnect
from pcl_fast.distributed.world import World

__all__ = [
    "World",
    "all_gather_rows",
    "all_gather_shards",
    "all_or_none",
    "all_reduce_sum",
    "begin_all_reduce_sum",
    "begin_to_read",
    "check_same",
    "connect",
    "disconnect",
    "gather_objects",
    "main_first",
    "shard_bounds",
    "shard_lengths",
]
