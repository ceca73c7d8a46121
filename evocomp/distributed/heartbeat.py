"""Heartbeats of all ranks in a store of the job: which ranks are alive, which have exited."""

import atexit
import os
import socket
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
"""A rank that works on the queue and finishes no candidate batch for this long counts as hung: its heartbeat stops."""


class HeartbeatStore:
    """Store with a heartbeat counter per rank; rank 0 hosts it and decides which ranks are dead.

    Heartbeats are counters, so that clocks of different nodes are never compared. A thread with its own connection
    sends them, so that a long forward pass does not look like a dead rank.
    """

    def __init__(self, host: str, port: int):
        self.me, self.world = rank(), world_size()
        self._worked_at: float | None = None  # time of the last `beat`; None outside `working`
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
    def working(self) -> Iterator[None]:
        """Context of work on the queue, in which a rank that does not call `beat` counts as hung."""
        self._worked_at = time.monotonic()
        try:
            yield
        finally:
            self._worked_at = None

    def beat(self) -> None:
        """Report progress."""
        if self._worked_at is not None:
            self._worked_at = time.monotonic()

    def gone(self) -> set[int]:
        """Ranks that exited or are presumed dead; their chunks must be reassigned."""
        return {int(other) for other in self._store.get("gone").decode().split(",") if other}

    def leave(self) -> None:
        """Report the exit of this rank; rank 0 waits up to 10 s for the others, which may still query its store."""
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
        """Heartbeat thread; on rank 0 it also looks for silent ranks."""
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
            return  # rank 0 is gone; the next use of the store raises the error

    def _listen(self, own: dist.TCPStore) -> set[int]:
        """Log ranks whose heartbeat stopped or resumed; return the silent and the exited ranks."""
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
            logger.error("rank %d sent no heartbeat for %.0f s", other, DEAD_AFTER_SECONDS)
        for other in sorted(self._named - silent):
            logger.error("rank %d sends heartbeats again", other)
        self._named = silent
        return silent | left


_heartbeats: HeartbeatStore | None = None
_server: dist.TCPStore | None = None


def heartbeat_store() -> HeartbeatStore:
    """The store of this job, made at the first call on a free port of rank 0's host."""
    global _heartbeats, _server
    if _heartbeats is None:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if rank() == 0:
            _server = _listen_at(host)
            _server.set("gone", "")
            for other in range(world_size()):
                _server.set(f"heartbeat/{other}", "")
        port = broadcast(_server.port if rank() == 0 else None)
        _heartbeats = HeartbeatStore(host, port)
    return _heartbeats


def _listen_at(host: str) -> dist.TCPStore:
    """A store on a free port of the address that the ranks use, not on all interfaces of this machine: it has no
    password."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind((address[0], 0, *address[2:]))
        listener.listen(1024)
    except OSError:  # a name that leads to this machine from outside only, as behind address translation
        listener.close()
        return dist.TCPStore(host, 0, None, True, wait_for_workers=False)
    port = listener.getsockname()[1]
    # the store takes the socket over and closes it
    return dist.TCPStore(
        host, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )


def leave() -> None:
    """Report the exit of this rank and destroy the process group; rank 0 exits last because it hosts the queue."""
    if _heartbeats is not None:
        _heartbeats.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


_inside = False


@contextmanager
def process_group() -> Iterator[None]:
    """Initialise the process group; destroy it on success and on a `UserError`.

    Inside another `process_group`, this does nothing. A process that exits with an open group may abort, and the
    launcher then kills the other processes. Other exceptions leave the group open, so that the other ranks see a crash
    and not an orderly exit.

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
