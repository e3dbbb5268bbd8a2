"""The ranks of a run: how they connect (connecting.py), each with a device that it can use (gpu.py), how they exchange
tensors (collectives.py) and gradients (gradients.py), also where a step is captured (between.py), and what they must
agree on (agreement.py).
"""

from pcl_fast.distributed.agreement import all_or_none, check_same, gather_objects, main_first
from pcl_fast.distributed.between import CannotCaptureError, between_graphs, taking_calls
from pcl_fast.distributed.collectives import (
    all_gather_rows,
    all_gather_shards,
    all_gather_with_gradient,
    all_reduce_sum,
    begin_all_reduce_sum,
    begin_to_read,
    shard_bounds,
    shard_lengths,
)
from pcl_fast.distributed.connecting import connect, disconnect
from pcl_fast.distributed.gradients import average_gradients
from pcl_fast.distributed.world import World

__all__ = [
    "CannotCaptureError",
    "World",
    "all_gather_rows",
    "all_gather_shards",
    "all_gather_with_gradient",
    "all_or_none",
    "all_reduce_sum",
    "average_gradients",
    "begin_all_reduce_sum",
    "begin_to_read",
    "between_graphs",
    "check_same",
    "connect",
    "disconnect",
    "gather_objects",
    "main_first",
    "shard_bounds",
    "shard_lengths",
    "taking_calls",
]
