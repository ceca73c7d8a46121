"""Who am I in this job, and which piece of work is mine next. Everything here also works in one process."""

from evocomp.distributed.board import joined
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
from evocomp.distributed.team import Team

__all__ = [
    "StopRequest",
    "Team",
    "WorkQueue",
    "broadcast",
    "from_rank_0",
    "gather",
    "in_turn",
    "joined",
    "launched_by_torchrun",
    "local_rank",
    "local_size",
    "rank",
    "set_threads",
    "world_size",
]
