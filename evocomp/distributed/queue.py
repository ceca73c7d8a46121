"""A work queue for the processes of a job: a counter in a TCPStore of its own."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from evocomp.distributed import heartbeat
from evocomp.distributed.job import local_rank, rank, world_size
from evocomp.distributed.shard_group import ShardGroup
from evocomp.log import UserError, logger

_numbers = itertools.count()  # numbers of the queues and turns of this job, so that their keys differ
_END = -1


class WorkQueue:
    """Assigns each chunk of work to one process of the job, in the given order (most expensive first).

    Ranks claim chunks with a counter in a TCPStore and wait in that store, never in a collective: a collective that is
    pending for longer than the process group's timeout kills the job. The chunk of a rank whose heartbeat stops is
    assigned again. Where several processes hold the model together, their leader claims chunks for all of them.

    Args:
        name: equal on all ranks, which must create their queues in the same order.
        finished: whether the result of a chunk is already in the label store, whichever rank made it.
        shard_group: the processes that work on one chunk together.
    """

    def __init__(self, name: str, finished: Callable[[int], bool], shard_group: ShardGroup | None = None):
        self.name = name
        self.finished = finished
        self.shard_group = shard_group or ShardGroup()
        self.waited = 0.0
        self._heartbeats = heartbeat.heartbeat_store() if world_size() > 1 else None
        self._keys = self._heartbeats.keys(f"queue/{next(_numbers)}/{name}") if self._heartbeats else None

    def __call__(self, chunks: Sequence[int]) -> Iterator[int]:
        """Yield the chunks for this process; return when all chunks of the job are finished."""
        if self._keys is None:
            yield from chunks
            return
        with reaching_rank_0(), self._heartbeats.working():
            if not self.shard_group.leads:
                yield from self._followed()
                return
            for number, chunk in enumerate(itertools.chain(self._claimed(chunks), self._take_over(chunks), [_END])):
                if self.shard_group.size > 1:
                    self._keys.set(self._announced(number), str(chunk))
                if chunk != _END:
                    yield chunk

    def beat(self) -> None:
        """Report progress; call it between candidate batches."""
        if self._heartbeats is not None:
            self._heartbeats.beat()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until rank 0 has made the condition true; raise `UserError` if rank 0 is gone before."""
        while not condition():
            try:
                if self._keys is not None:
                    self._keys.check(["next"])
            except (dist.DistNetworkError, dist.DistStoreError):
                if not condition():
                    raise _lost_rank_0() from None
            time.sleep(0.05)

    def _claimed(self, chunks: Sequence[int]) -> Iterator[int]:
        while (claim := self._keys.add("next", 1) - 1) < len(chunks):
            yield from self._work_on(chunks[claim])

    def _announced(self, number: int) -> str:
        """Key of the group leader's number-th announced chunk."""
        return f"group/{self.shard_group.index}/{number}"

    def _followed(self) -> Iterator[int]:
        """The chunks that the leader announces; no collective, because the leader may wait for hours between them."""
        for number in itertools.count():
            started = time.monotonic()
            while not self._keys.check([self._announced(number)]):
                self.beat()
                if self.shard_group.leader in self._heartbeats.gone():
                    raise UserError(
                        f"rank {self.shard_group.leader}, which leads the shard group of rank {rank()}, has stopped"
                    )
                time.sleep(0.05)
            self.waited += time.monotonic() - started
            chunk = int(self._keys.get(self._announced(number)))
            if chunk == _END:
                return
            yield chunk

    def _work_on(self, chunk: int) -> Iterator[int]:
        self._keys.set(f"owner/{chunk}", str(rank()))
        yield chunk
        self._keys.set(f"done/{chunk}", "1")  # the caller asks for the next chunk once this one is stored

    def _take_over(self, chunks: Sequence[int]) -> Iterator[int]:
        """Wait for the chunks of other ranks; claim those of dead ranks."""
        started = time.monotonic()
        remaining = list(chunks)
        while remaining := self._unfinished(remaining):
            self.beat()
            gone = self._heartbeats.gone()
            for chunk in remaining:
                known = self._keys.check([f"owner/{chunk}"])
                owner = int(self._keys.get(f"owner/{chunk}")) if known else -1
                # claimed by a rank that died before it could record itself: all chunks are claimed at this point
                ownerless = owner == -1 and time.monotonic() - started > heartbeat.DEAD_AFTER_SECONDS
                if not ownerless and (owner not in gone or owner == rank()):
                    continue
                if self.finished(chunk):  # the rank died between storing the chunk and recording it
                    self._keys.set(f"done/{chunk}", "1")
                # the first rank to add claims the chunk; written twice it would have the same bytes
                elif self._keys.add(f"takeover/{chunk}/{owner}", 1) == 1:
                    logger.error("rank %d takes over chunk %d of rank %d", rank(), chunk, owner)
                    yield from self._work_on(chunk)
            # poll often at first, so that short rounds are not delayed, and rarely later
            time.sleep(min(0.1, 0.05 * (time.monotonic() - started) + 0.002))
        self.waited += time.monotonic() - started

    def _unfinished(self, chunks: list[int]) -> list[int]:
        """The chunks that are not done, found by bisection: few queries where few chunks are missing."""
        if not chunks or self._keys.check([f"done/{chunk}" for chunk in chunks]):
            return []
        if len(chunks) == 1:
            return chunks
        half = len(chunks) // 2
        return self._unfinished(chunks[:half]) + self._unfinished(chunks[half:])


@contextmanager
def in_turn() -> Iterator[None]:
    """Run the body in one process of a node after another; all processes leave the context together.

    Processes wait in the store and not in a collective, whose timeout may be shorter than the turns of a node.
    """
    if world_size() == 1:
        yield
        return
    heartbeats = heartbeat.heartbeat_store()
    keys = heartbeats.keys(f"turn/{next(_numbers)}")

    def wait_for(ranks: Iterable[int]) -> None:
        others = [str(other) for other in ranks]
        while others and not keys.check(others):
            time.sleep(0.1)

    with reaching_rank_0():
        wait_for(range(rank() - local_rank(), rank()))
        try:
            yield
        finally:
            keys.set(str(rank()), "done")  # or failed: the other processes will fail in the same way
        wait_for(range(world_size()))


class reaching_rank_0:
    """Context that turns errors of the store into a `UserError`: its host is gone."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
            raise _lost_rank_0() from None


def _lost_rank_0() -> UserError:
    return UserError(
        f"rank {rank()} lost the connection to rank 0, which hosts the label queue; finished chunks are stored, "
        "run the same command again"
    )
