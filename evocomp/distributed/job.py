"""Rank and size of the job, exchange of values between its processes, and requests to stop."""

import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from evocomp.launch import launched
from evocomp.log import UserError

_LOST = re.compile(r"onnection|connect|[Ss]ocket|[Tt]imed out|[Tt]imeout|[Bb]roken pipe|reset by peer")
"""What torch says of a process that is gone."""


def rank() -> int:
    """Index of this process in the job."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the job."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """Index of this process on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Number of processes of the job on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched_by_torchrun() else 1


def launched_by_torchrun() -> bool:
    """Whether a launcher set the environment variables of a job with several processes."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and "MASTER_ADDR" in os.environ and "RANK" in os.environ


def join() -> None:
    """Initialise the process group if a launcher started several processes; Lightning uses the same group.

    Raises:
        UserError: more processes than GPUs on this node, or a process of the job is gone.
    """
    if not launched_by_torchrun() or dist.is_initialized():
        return
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank()} of this node has no GPU, the node has {torch.cuda.device_count()}: "
                "start one process per GPU (PROCESSES=gpu)"
            )
        torch.cuda.set_device(local_rank())
    with _reaching_others():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            dist.init_process_group(backend)
            return
        store, me, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(_agreed_attempt(store, me, size), store)
        dist.init_process_group(backend, store=store, rank=me, world_size=size)


def _agreed_attempt(store: dist.Store, me: int, size: int) -> str:
    """A name for this attempt that all ranks of it agree on, unlike those of earlier attempts.

    The store of torchrun's agent outlives a restart, and with it the addresses of processes that are gone. Restart
    counts do not serve: the agents of two nodes may have different ones. Rank 0 answers whoever says hello, until all
    have taken its answer; an answer to a process that is gone is never taken.
    """
    attempt = uuid.uuid4().hex
    if me != 0:
        hello = uuid.uuid4().hex
        store.set(f"hello/{me}", hello)
        attempt = store.get(f"answer/{hello}").decode()
        store.set(f"taken/{attempt}/{me}", "1")
        return attempt
    waiting, until = set(range(1, size)), time.monotonic() + 1800
    while waiting and time.monotonic() < until:
        for other in sorted(waiting):
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", attempt)
            if store.check([f"taken/{attempt}/{other}"]):
                waiting.discard(other)
        time.sleep(0.02 if waiting else 0)
    return attempt


def broadcast(value, source: int = 0):
    """`value` of rank `source` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    with _reaching_others():
        dist.broadcast_object_list(box, src=source, device=_object_device())
    return box[0]


def gather(value) -> list[Any]:
    """Every rank's `value`, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    with _reaching_others():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Turn the loss of another process, which gloo and TCPStore tell in forty lines, into a `UserError`."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not _LOST.search(str(error)):
            raise
        where = os.environ.get("RANK", "0")
        raise UserError(
            f"rank {where} lost another process of the job ({' '.join(str(error).split())[:160]}); finished work is "
            "kept, run the same command again"
        ) from None


def from_rank_0(look: Callable[[], Any]) -> Any:
    """Call `look` on rank 0 only and return its result on every rank; a `UserError` is raised on every rank."""
    answer: Any = None
    if rank() == 0:
        try:
            answer = look()
        except UserError as error:
            answer = error
    answer = broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def _object_device() -> torch.device | None:
    """Device for exchanged objects: the CPU if the group has gloo."""
    return torch.device("cpu") if "gloo" in dist.get_backend_config() else None


def set_threads(threads: int) -> None:
    """Set torch's CPU threads; 0: one per idle core, at most four. In a job that `evocomp` started itself: one."""
    if launched() > 1:
        threads = 1
    if threads == 0 and "OMP_NUM_THREADS" not in os.environ:
        cores = os.cpu_count() or 1
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        threads = max(1, min(4, int(cores - busy)))
    if threads:
        torch.set_num_threads(threads)


class StopRequest:
    """Context that records SIGTERM instead of exiting, so that the work in progress can be finished.

    A nested context starts with the request that the outer one recorded.

    Args:
        chain: also call the previous handler of SIGTERM.
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
        except ValueError:  # not the main thread, which alone may set handlers
            self._previous = None
        return self

    def __exit__(self, *_) -> None:
        self._active.remove(self)
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
