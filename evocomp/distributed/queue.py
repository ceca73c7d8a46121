"""Work handed out by a counter in a store of the project's own."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from evocomp.distributed import board
from evocomp.distributed.job import local_rank, rank, world_size
from evocomp.distributed.team import Team
from evocomp.log import UserError, logger

_numbers = itertools.count()  # of the queues and turns of this job: none may find an earlier one's keys
_END = -1


class WorkQueue:
    """Hands out chunks of work to the processes of a job: each to one of them, costliest first.

    Ranks claim chunks with a counter in a TCPStore of the project's own and wait in that store, never in a
    collective: a collective that is pending while one rank works longer than the process group's timeout kills
    the job. A rank whose heartbeat stops is named, and its chunk is handed out again. Where several processes hold
    the model together, their leader takes a chunk for all of them.

    Args:
        name: the same on all ranks, which make their queues in the same order.
        finished: tells whether a chunk's result is there already (in the store of labels), by whomever made.
        team: the processes that work on a chunk together.
    """

    def __init__(self, name: str, finished: Callable[[int], bool], team: Team | None = None):
        self.name = name
        self.finished = finished
        self.team = team or Team()
        self.waited = 0.0
        self._board = board.job_board() if world_size() > 1 else None
        self._keys = self._board.keys(f"queue/{next(_numbers)}/{name}") if self._board else None

    def __call__(self, chunks: Sequence[int]) -> Iterator[int]:
        """The chunks that this process is to work on; ends when all chunks of the job are finished."""
        if self._keys is None:
            yield from chunks
            return
        with reaching_rank_0(), self._board.at_work():
            if not self.team.leads:
                yield from self._followed()
                return
            for number, chunk in enumerate(itertools.chain(self._claimed(chunks), self._take_over(chunks), [_END])):
                if self.team.size > 1:
                    self._keys.set(self._order(number), str(chunk))
                if chunk != _END:
                    yield chunk

    def beat(self) -> None:
        """Say that work goes on; called between candidate batches."""
        if self._board is not None:
            self._board.beat()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for what rank 0 brings about; UserError if rank 0 is gone and it is not so."""
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

    def _order(self, number: int) -> str:
        """Key under which the leader says what its team does as its so manyth piece of work."""
        return f"team/{self.team.index}/{number}"

    def _followed(self) -> Iterator[int]:
        """The chunks that the leader takes; between them the leader may wait for hours, so this is no collective."""
        for number in itertools.count():
            started = time.monotonic()
            while not self._keys.check([self._order(number)]):
                self.beat()
                if self.team.leader in self._board.gone():
                    raise UserError(f"rank {self.team.leader}, which leads rank {rank()}'s shard group, has stopped")
                time.sleep(0.05)
            self.waited += time.monotonic() - started
            chunk = int(self._keys.get(self._order(number)))
            if chunk == _END:
                return
            yield chunk

    def _work_on(self, chunk: int) -> Iterator[int]:
        self._keys.set(f"owner/{chunk}", str(rank()))
        yield chunk
        self._keys.set(f"done/{chunk}", "1")  # the caller has come back for more: the chunk is stored

    def _take_over(self, chunks: Sequence[int]) -> Iterator[int]:
        """Wait for the others' chunks; take those of ranks that have died."""
        started = time.monotonic()
        remaining = list(chunks)
        while remaining := self._unfinished(remaining):
            self.beat()
            gone = self._board.gone()
            for chunk in remaining:
                known = self._keys.check([f"owner/{chunk}"])
                owner = int(self._keys.get(f"owner/{chunk}")) if known else -1
                # claimed, but by nobody who lived to say so: all chunks are claimed when one comes here
                ownerless = owner == -1 and time.monotonic() - started > board.DEAD_AFTER_SECONDS
                if not ownerless and (owner not in gone or owner == rank()):
                    continue
                if self.finished(chunk):  # it died between storing the chunk and saying so
                    self._keys.set(f"done/{chunk}", "1")
                # the first to say so takes it; written twice it would be the same bytes
                elif self._keys.add(f"takeover/{chunk}/{owner}", 1) == 1:
                    logger.error("rank %d takes over chunk %d of rank %d", rank(), chunk, owner)
                    yield from self._work_on(chunk)
            # short rounds are not made longer, long ones not disturbed
            time.sleep(min(0.1, 0.05 * (time.monotonic() - started) + 0.002))
        self.waited += time.monotonic() - started

    def _unfinished(self, chunks: list[int]) -> list[int]:
        """Those not done, in a number of questions that grows with their number and not with that of all chunks."""
        if not chunks or self._keys.check([f"done/{chunk}" for chunk in chunks]):
            return []
        if len(chunks) == 1:
            return chunks
        half = len(chunks) // 2
        return self._unfinished(chunks[:half]) + self._unfinished(chunks[half:])


@contextmanager
def in_turn() -> Iterator[None]:
    """One process of a node after another; all leave together.

    They wait in the store, for the turns of a node may take longer than collectives may.
    """
    if world_size() == 1:
        yield
        return
    job = board.job_board()
    keys = job.keys(f"turn/{next(_numbers)}")

    def wait_for(ranks: Iterable[int]) -> None:
        others = [str(other) for other in ranks]
        while others and not keys.check(others):
            time.sleep(0.1)

    with reaching_rank_0():
        wait_for(range(rank() - local_rank(), rank()))
        try:
            yield
        finally:
            keys.set(str(rank()), "done")  # or failed: what ails this process will be told by the others too
        wait_for(range(world_size()))


class reaching_rank_0:
    """Errors of the store become one line: its host is gone."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
            raise _lost_rank_0() from None


def _lost_rank_0() -> UserError:
    return UserError(
        f"rank {rank()} has lost rank 0, which hosts the label queue; finished chunks are stored, start the same "
        "command again"
    )
