"""Groups of processes that hold one frozen model together because it does not fit one device."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from evocomp.distributed.job import local_size, rank, world_size
from evocomp.log import UserError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ShardGroup:
    """`size` consecutive ranks that run forward passes of the model together; by default a single process.

    A forward pass of one member gathers weights from all of them, so all must run equally many. Members do the same
    work with the same random numbers and divide only the batches of scored masks among themselves.

    Attributes:
        group: torch process group of the members; None for a single process.
    """

    size: int = 1
    group: Any = None

    @classmethod
    def form(cls, size: int) -> "ShardGroup":
        """Split the job into groups of `size` processes, 0 for all of a node; every rank must call this.

        Raises:
            UserError: the number of processes in the job or on a node is no multiple of `size`.
        """
        size = size or local_size()
        if size == 1:
            return cls()
        if world_size() % size or local_size() % size:
            raise UserError(
                f"model.shard={size}: the job has {world_size()} processes, {local_size()} of them on this node; both "
                f"must be multiples of {size}: start such a number with experiments/launch/, or choose a divisor"
            )
        starts = range(0, world_size(), size)
        groups = [dist.new_group(list(range(start, start + size))) for start in starts]
        return cls(size, groups[rank() // size])

    @property
    def index(self) -> int:
        """Index of this group in the job."""
        return rank() // self.size

    @property
    def count(self) -> int:
        """Number of groups in the job."""
        return world_size() // self.size

    @property
    def member(self) -> int:
        """Index of this process in the group."""
        return rank() % self.size

    @property
    def leader(self) -> int:
        """Rank of the member that claims chunks and writes results for the group."""
        return rank() - self.member

    @property
    def leads(self) -> bool:
        """Whether this process is the leader."""
        return self.member == 0

    def gather(self, value: T) -> list[T]:
        """The `value` of every member, in member order, on every member.

        Raises:
            UserError: a member has exited.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise UserError(
                f"rank {rank()} lost a process of its shard group: {str(error).splitlines()[0]}; "
                "finished chunks are stored, run the same command again"
            ) from None
        return values
