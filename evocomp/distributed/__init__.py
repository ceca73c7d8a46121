"""Ranks, process groups and the work queue of a job. Everything also works in a single process."""

from evocomp.distributed.heartbeat import process_group
from evocomp.distributed.job import (
    StopRequest,
    broadcast,
    from_rank_0,
    gather,
    launched_by_torchrun,
    local_rank,
    local_size,
    rank,
    set_threads,
    world_size,
)
from evocomp.distributed.queue import WorkQueue, in_turn
from evocomp.distributed.shard_group import ShardGroup

__all__ = [
    "ShardGroup",
    "StopRequest",
    "WorkQueue",
    "broadcast",
    "from_rank_0",
    "gather",
    "in_turn",
    "launched_by_torchrun",
    "local_rank",
    "local_size",
    "process_group",
    "rank",
    "set_threads",
    "world_size",
]
