"""Use the idle cores of a CPU: start more processes of the same command, with this process as rank 0.

Does not import torch, so that all processes start at the same time.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from evocomp.log import logger

MOST = 4
"""Maximum number of processes: each then has eight questions of a training batch of 32."""
PATIENCE_SECONDS = 60.0
"""How long the other processes may run after rank 0 has finished."""
_LAUNCHED = "EVOCOMP_PROCESSES"
_PARENT = "EVOCOMP_PARENT"
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
_PLACED_BY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "OMP_NUM_THREADS")


def idle_processes(trainer: Mapping[str, Any], threads: int, batch_size: int) -> int:
    """Number of processes for a run on CPUs: one per idle core, such that a batch divides evenly among them.

    Args:
        trainer: arguments of the Trainer; one process if they set devices, nodes or a strategy, or allow a GPU.
        threads: CPU threads of torch; one process if they are set, here or by `OMP_NUM_THREADS`.
        batch_size: questions per training step, over all processes.
    """
    placed = threads or trainer.get("accelerator") != "cpu" or {"devices", "num_nodes", "strategy"} & set(trainer)
    if placed or any(name in os.environ for name in _PLACED_BY):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    most = max(1, min(MOST, int(cores - busy + 0.5)))
    return max(count for count in range(1, most + 1) if batch_size % count == 0)


def launched() -> int:
    """Number of processes of `beside`, including this one; 1 if another launcher started the job, or none did."""
    return int(os.environ.get(_LAUNCHED, "1"))


@contextmanager
def beside(count: int, words: Sequence[str]) -> Iterator[None]:
    """Make this process rank 0 of `count`; the others run `python -m evocomp WORDS` with one thread each.

    They are terminated when rank 0 ends, for whatever reason. If one of them fails by itself, the last line of its
    output is logged.
    """
    if count == 1:
        yield
        return
    logger.info("%d processes share the work; --threads=1 starts one", count)
    before = dict(os.environ)
    os.environ |= _environment(count)
    others = []
    try:
        for rank in range(1, count):
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with its process below
            environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "evocomp", *words]
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            others.append((process, output))
        yield
        for process, _ in others:
            process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning("a worker process did not finish in time and is terminated")
    finally:
        for process, output in others:
            _end(process)
            output.seek(0)
            lines = output.read().strip().splitlines()
            if process.returncode not in (0, 2, -15) and lines:
                logger.error("a worker process failed (exit code %d): %s", process.returncode, lines[-1])
            output.close()
        os.environ.clear()
        os.environ |= before


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it is gone, even by SIGKILL; on Linux.

    Only for processes of a job whose launcher waits for them: those of `beside`, of torchrun and of Lightning.
    """
    own = launched() > 1 and os.environ.get("RANK", "0") != "0"
    lightning = "LOCAL_RANK" in os.environ and "RANK" not in os.environ and os.environ["LOCAL_RANK"] != "0"
    if not (own or lightning or "TORCHELASTIC_RUN_ID" in os.environ) or not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    except (OSError, AttributeError):
        return
    if own and os.getppid() != int(os.environ.get(_PARENT, os.getppid())):
        os._exit(2)  # it had ended before


def _environment(count: int) -> dict[str, str]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**ranks, **address, "OMP_NUM_THREADS": "1", _LAUNCHED: str(count), _PARENT: str(os.getpid())}


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
