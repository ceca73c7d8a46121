"""Who am I in this job, and which piece of work is mine next. Everything here also works in one process."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from evocomp.log import UserError, logger

HEARTBEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 45.0


def rank() -> int:
    """This process's number in the job."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the job."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched_by_torchrun() -> bool:
    """Whether a launcher has set the variables of a job of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def set_threads(threads: int) -> None:
    """CPU threads of torch; 0 = all cores if they are idle (two threads on a busy machine are slower than one)."""
    if threads == 0 and "OMP_NUM_THREADS" not in os.environ:
        cores = os.cpu_count() or 1
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        threads = max(1, min(4, int(cores - busy)))
    if threads:
        torch.set_num_threads(threads)


class StopRequest:
    """Notes SIGTERM instead of dying of it, so that the piece of work in hand can be finished."""

    def __init__(self) -> None:
        self.asked = False
        self._previous = None

    def __enter__(self) -> "StopRequest":
        def note(number, frame):
            self.asked = True
            if callable(self._previous):
                self._previous(number, frame)

        try:
            self._previous = signal.signal(signal.SIGTERM, note)
        except ValueError:  # not the main thread: whoever owns it handles signals
            self._previous = None
        return self

    def __exit__(self, *_) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


class WorkQueue:
    """Hands out chunks of work to the processes of a job: each to one of them, costliest first.

    Ranks claim chunks with a counter in a TCPStore of the project's own and wait in that store, never in a
    collective: a collective that is pending while one rank works longer than the process group's timeout kills
    the job. A rank whose heartbeat stops is named, and its chunk is handed out again.

    Args:
        name: must differ from that of any earlier queue of the job.
        finished: tells whether a chunk's result is there already (in the shared store), by whomever made.
    """

    def __init__(self, name: str, finished: Callable[[int], bool]):
        self.name = name
        self.finished = finished
        self.waited = 0.0
        self._store = _job_store() if world_size() > 1 else None

    def __call__(self, chunks: Sequence[int]) -> Iterator[int]:
        """The chunks that this process is to work on; ends when all chunks of the job are finished."""
        if self._store is None:
            yield from chunks
            return
        keys = dist.PrefixStore(f"queue/{self.name}", self._store)
        me = rank()
        while (claim := keys.add("next", 1) - 1) < len(chunks):
            self._claim(keys, me, chunks[claim])
            yield chunks[claim]
        yield from self._take_over(keys, me, chunks)

    def beat(self) -> None:
        """Say that this process is alive; called between candidate batches."""
        if self._store is not None:
            self._store.set(f"heartbeat/{rank()}", str(time.time()))

    def _claim(self, keys, me: int, chunk: int) -> None:
        self.beat()
        keys.set(f"owner/{chunk}", str(me))

    def _take_over(self, keys, me: int, chunks: Sequence[int]) -> Iterator[int]:
        """Wait for the others' chunks; take those of ranks that have died."""
        started = time.time()
        named: set[int] = set()
        while remaining := [chunk for chunk in chunks if not self.finished(chunk)]:
            self.beat()
            for chunk in remaining:
                owner = int(keys.get(f"owner/{chunk}")) if keys.check([f"owner/{chunk}"]) else -1
                if owner in (me, -1) or self._alive(owner):
                    continue
                if owner not in named:
                    named.add(owner)
                    logger.error("rank %d has not been heard of for %.0f s", owner, DEAD_AFTER_SECONDS)
                # the first to say so takes it; written twice it would be the same bytes
                if keys.add(f"takeover/{chunk}/{owner}", 1) == 1:
                    self._claim(keys, me, chunk)
                    yield chunk
            time.sleep(0.2)
        self.waited += time.time() - started

    def _alive(self, other: int) -> bool:
        key = f"heartbeat/{other}"
        return self._store.check([key]) and time.time() - float(self._store.get(key)) < DEAD_AFTER_SECONDS


_store: dist.TCPStore | None = None


def _job_store() -> dist.TCPStore:
    """One store for the life of the job, on a free port of rank 0's host."""
    global _store
    if _store is None:
        me, patience = rank(), timedelta(minutes=5)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if me == 0:
            _store = dist.TCPStore(host, 0, None, True, timeout=patience, wait_for_workers=False)
        address = [(host, _store.port) if me == 0 else None]
        dist.broadcast_object_list(address, src=0)
        if me != 0:
            try:
                _store = dist.TCPStore(*address[0], None, False, timeout=patience, wait_for_workers=False)
            except (OSError, RuntimeError) as error:
                raise UserError(f"rank {me} cannot reach the label queue at {address[0]}: {error}") from None
    return _store


def broadcast(value, source: int = 0):
    """`value` of rank `source` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]
