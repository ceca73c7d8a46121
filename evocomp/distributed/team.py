"""Processes that hold one frozen model together, where it does not fit one device."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from evocomp.distributed.job import local_size, rank, world_size
from evocomp.log import UserError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Team:
    """`size` neighbouring ranks that run the model's forwards together; of one process, if not told otherwise.

    A forward of one member gathers weights from all, so all must run equally many. Members therefore do the same
    work with the same random numbers, and share out only the batches of masks that are scored.

    Attributes:
        group: the process group of the members; None for a team of one.
    """

    size: int = 1
    group: Any = None

    @classmethod
    def form(cls, size: int) -> "Team":
        """Split the job into teams of `size` processes, 0 = all of a node; every rank of the job calls this.

        Raises:
            UserError: the job or its nodes cannot be split so.
        """
        size = size or local_size()
        if size == 1:
            return cls()
        if world_size() % size or local_size() % size:
            raise UserError(
                f"model.shard={size}: {world_size()} processes, {local_size()} on this node, make no groups of {size}; "
                "start that many with experiments/launch/, or choose a divisor"
            )
        starts = range(0, world_size(), size)
        groups = [dist.new_group(list(range(start, start + size))) for start in starts]
        return cls(size, groups[rank() // size])

    @property
    def index(self) -> int:
        """Which of the job's teams this is."""
        return rank() // self.size

    @property
    def count(self) -> int:
        """Teams in the job."""
        return world_size() // self.size

    @property
    def member(self) -> int:
        """This process's number in the team."""
        return rank() % self.size

    @property
    def leader(self) -> int:
        """Rank of the member that takes work and writes results for all."""
        return rank() - self.member

    @property
    def leads(self) -> bool:
        """Whether this process is the leader."""
        return self.member == 0

    def gather(self, value: T) -> list[T]:
        """Every member's `value`, by member, on every member.

        Raises:
            UserError: a member is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise UserError(
                f"rank {rank()} has lost a process of its shard group: {str(error).splitlines()[0]}; finished chunks "
                "are stored, start the same command again"
            ) from None
        return values
