"""The job's store with every rank's heartbeat: who lives, and who has signed off."""

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from evocomp.distributed.job import broadcast, join, rank, world_size
from evocomp.log import UserError, logger

HEARTBEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 45.0
STALLED_AFTER_SECONDS = 1800.0
"""A process at work on the queue that has not finished a candidate batch for so long stops its heartbeat: it hangs."""


class Board:
    """The job's store with every rank's heartbeat; rank 0 hosts it and judges who is dead.

    Heartbeats are counters: clocks of different nodes are never compared. They come from a thread with a connection
    of its own, so a long forward is not taken for death.
    """

    def __init__(self, host: str, port: int):
        self.me, self.world = rank(), world_size()
        self._worked_at: float | None = None  # at work on the queue: when it last got on
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

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While this lasts, a process that does not `beat` hangs; training and measuring take what they take."""
        self._worked_at = time.monotonic()
        try:
            yield
        finally:
            self._worked_at = None

    def beat(self) -> None:
        """Say that work goes on."""
        if self._worked_at is not None:
            self._worked_at = time.monotonic()

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
                worked_at = self._worked_at
                if worked_at is None or time.monotonic() - worked_at < STALLED_AFTER_SECONDS:
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


_board: Board | None = None
_server: dist.TCPStore | None = None


def job_board() -> Board:
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
        _board = Board(host, port)
    return _board


def leave() -> None:
    """Part from the others at the end of a job; rank 0 goes last, for it hosts the queue."""
    if _board is not None:
        _board.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


_inside = False


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes for the time of a job, and part from them also where it is refused or interrupted.

    Inside another `joined`, does nothing. A process that ends with its group open may abort, and a launcher then kills
    the others with it. Of errors that are nobody's to put right (anything but `UserError`) a process dies as it is: the
    others must not take it for gone by agreement.

    Raises:
        UserError: more processes than GPUs on this node.
    """
    global _inside
    if _inside:
        yield
        return
    join()
    _inside = True
    try:
        yield
    except UserError:
        leave()
        raise
    finally:
        _inside = False
    leave()
