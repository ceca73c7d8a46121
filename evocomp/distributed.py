"""Who am I in this job, and which piece of work is mine next. Everything here also works in one process."""

import atexit
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from evocomp.log import UserError, logger

HEARTBEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 45.0
STALLED_AFTER_SECONDS = 1800.0
"""A process that has not finished a candidate batch for so long stops its heartbeat: it hangs."""


def rank() -> int:
    """This process's number in the job."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the job."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_by_torchrun() -> bool:
    """Whether a launcher has set the variables of a job of several processes."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and "MASTER_ADDR" in os.environ and "RANK" in os.environ


def join() -> None:
    """Meet the other processes, if a launcher started several; Lightning then goes on with the same group."""
    if not launched_by_torchrun() or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def leave() -> None:
    """Part from the others at the end of a job; rank 0 goes last, for it hosts the queue."""
    if _board is not None:
        _board.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast(value, source: int = 0):
    """`value` of rank `source` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=_object_device())
    return box[0]


def gather(value) -> list[Any]:
    """Every rank's `value`, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _object_device() -> torch.device | None:
    """Where objects travel: over gloo if the group has it."""
    return torch.device("cpu") if "gloo" in dist.get_backend_config() else None


def set_threads(threads: int) -> None:
    """CPU threads of torch; 0 = all cores if they are idle (two threads on a busy machine are slower than one)."""
    if threads == 0 and "OMP_NUM_THREADS" not in os.environ:
        cores = os.cpu_count() or 1
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        threads = max(1, min(4, int(cores - busy)))
    if threads:
        torch.set_num_threads(threads)


class StopRequest:
    """Notes SIGTERM instead of dying of it, so that the piece of work in hand can be finished.

    One inside another knows what the outer one has noted.

    Args:
        chain: also do what was done at SIGTERM before.
    """

    _active: list["StopRequest"] = []

    def __init__(self, chain: bool = True) -> None:
        self.asked = False
        self._chain = chain
        self._previous = None

    def __enter__(self) -> "StopRequest":
        def note(number, frame):
            self.asked = True
            if self._chain and callable(self._previous):
                self._previous(number, frame)

        self.asked = any(outer.asked for outer in self._active)
        self._active.append(self)
        try:
            self._previous = signal.signal(signal.SIGTERM, note)
        except ValueError:  # not the main thread: whoever owns it handles signals
            self._previous = None
        return self

    def __exit__(self, *_) -> None:
        self._active.remove(self)
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


class WorkQueue:
    """Hands out chunks of work to the processes of a job: each to one of them, costliest first.

    Ranks claim chunks with a counter in a TCPStore of the project's own and wait in that store, never in a
    collective: a collective that is pending while one rank works longer than the process group's timeout kills
    the job. A rank whose heartbeat stops is named, and its chunk is handed out again.

    Args:
        name: the same on all ranks, which make their queues in the same order.
        finished: tells whether a chunk's result is there already (in the store of labels), by whomever made.
    """

    def __init__(self, name: str, finished: Callable[[int], bool]):
        self.name = name
        self.finished = finished
        self.waited = 0.0
        self._board = _job_board() if world_size() > 1 else None
        self._keys = self._board.keys(f"queue/{next(_numbers)}/{name}") if self._board else None

    def __call__(self, chunks: Sequence[int]) -> Iterator[int]:
        """The chunks that this process is to work on; ends when all chunks of the job are finished."""
        if self._keys is None:
            yield from chunks
            return
        self.beat()
        with reaching_rank_0():
            while (claim := self._keys.add("next", 1) - 1) < len(chunks):
                yield from self._work_on(chunks[claim])
            yield from self._take_over(chunks)

    def beat(self) -> None:
        """Say that work goes on; called between candidate batches."""
        if self._board is not None:
            self._board.worked_at = time.monotonic()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for what rank 0 brings about; UserError if rank 0 is gone and it is not so."""
        while not condition():
            self.beat()
            try:
                if self._keys is not None:
                    self._keys.check(["next"])
            except (dist.DistNetworkError, dist.DistStoreError):
                if not condition():
                    raise _lost_rank_0() from None
            time.sleep(0.05)

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
                ownerless = owner == -1 and time.monotonic() - started > DEAD_AFTER_SECONDS
                if not ownerless and (owner not in gone or owner == rank()):
                    continue
                if self.finished(chunk):  # it died between storing the chunk and saying so
                    self._keys.set(f"done/{chunk}", "1")
                # the first to say so takes it; written twice it would be the same bytes
                elif self._keys.add(f"takeover/{chunk}/{owner}", 1) == 1:
                    logger.error("rank %d takes over chunk %d of rank %d", rank(), chunk, owner)
                    yield from self._work_on(chunk)
            time.sleep(0.1)
        self.waited += time.monotonic() - started

    def _unfinished(self, chunks: list[int]) -> list[int]:
        """Those not done, in a number of questions that grows with their number and not with that of all chunks."""
        if not chunks or self._keys.check([f"done/{chunk}" for chunk in chunks]):
            return []
        if len(chunks) == 1:
            return chunks
        half = len(chunks) // 2
        return self._unfinished(chunks[:half]) + self._unfinished(chunks[half:])


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


class _Board:
    """The job's store with every rank's heartbeat; rank 0 hosts it and judges who is dead.

    Heartbeats are counters: clocks of different nodes are never compared. They come from a thread with a connection
    of its own, so a long forward is not taken for death.
    """

    def __init__(self, host: str, port: int):
        self.me, self.world = rank(), world_size()
        self.worked_at = time.monotonic()
        self._address = (host, port)
        self._store = self._connect()
        self._stop = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._named: set[int] = set()
        self._thread = threading.Thread(target=self._pulse, name="heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.leave)

    def keys(self, prefix: str) -> dist.PrefixStore:
        return dist.PrefixStore(prefix, self._store)

    def gone(self) -> set[int]:
        """Ranks that have signed off or that rank 0 holds for dead: what they have not finished, they never will."""
        return {int(other) for other in self._store.get("gone").decode().split(",") if other}

    def leave(self) -> None:
        """Sign off; rank 0 waits a while for the others, whose last question its store must answer."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(10.0)
        if self.me == 0 and not self._thread.is_alive():
            self._await_departures()

    def _await_departures(self) -> None:
        until = time.monotonic() + 10.0
        others = [f"left/{k}" for k in range(1, self.world) if k not in self._named]
        while others and time.monotonic() < until and not self._store.check(others):
            time.sleep(0.05)

    def _connect(self) -> dist.TCPStore:
        patience = timedelta(minutes=5)
        try:
            return dist.TCPStore(*self._address, None, False, timeout=patience, wait_for_workers=False)
        except (OSError, RuntimeError) as error:
            raise UserError(f"rank {self.me} cannot reach the label queue at {self._address}: {error}") from None

    def _pulse(self) -> None:
        """The thread: beat, and on rank 0 listen."""
        own, ticks = self._connect(), 0
        try:
            while not self._stop.is_set():
                if time.monotonic() - self.worked_at < STALLED_AFTER_SECONDS:
                    ticks += 1
                    own.set(f"heartbeat/{self.me}", str(ticks))
                if self.me == 0:
                    own.set("gone", ",".join(map(str, sorted(self._listen(own)))))
                self._stop.wait(HEARTBEAT_SECONDS)
            own.set(f"left/{self.me}", "1")
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError):
            return  # rank 0 is gone; whoever needs the store will say so

    def _listen(self, own: dist.TCPStore) -> set[int]:
        """Name the ranks that have fallen silent; returns them and those that have signed off."""
        now, silent, left = time.monotonic(), set(), set()
        beats = own.multi_get([f"heartbeat/{k}" for k in range(self.world)])
        for other, beat in enumerate(beats):
            if self._seen.get(other, (None, 0.0))[0] != beat:
                self._seen[other] = (beat, now)
            elif own.check([f"left/{other}"]):
                left.add(other)
            elif now - self._seen[other][1] > DEAD_AFTER_SECONDS:
                silent.add(other)
        for other in sorted(silent - self._named):
            logger.error("rank %d has not been heard of for %.0f s", other, DEAD_AFTER_SECONDS)
        for other in sorted(self._named - silent):
            logger.error("rank %d is heard of again", other)
        self._named = silent
        return silent | left


_numbers = itertools.count()  # of the queues of this job: none may find an earlier one's counters
_board: _Board | None = None
_server: dist.TCPStore | None = None


def _job_board() -> _Board:
    """One store for the life of the job, on a free port of rank 0's host."""
    global _board, _server
    if _board is None:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if rank() == 0:
            _server = dist.TCPStore(host, 0, None, True, wait_for_workers=False)
            _server.set("gone", "")
            for other in range(world_size()):
                _server.set(f"heartbeat/{other}", "")
        port = broadcast(_server.port if rank() == 0 else None)
        _board = _Board(host, port)
    return _board
