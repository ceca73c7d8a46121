"""Speed of two processes on one label queue against one process, with two independent processes as a control.

The control shows what the machine allows. Each process is pinned to its own core and has loaded and encoded everything
before the timing starts, so that start-up is not included. The three variants alternate in changing order. Wall time is
measured; `wall_per_cpu` shows whether the cores were idle: it is 1 if no other process used them. On busy cores,
compare `ratio_by_cpu`.
"""

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from evocomp import distributed
from evocomp.bench.timing import environment, quantiles
from evocomp.config.schema import GroupingConfig, LabelConfig, SearchConfig
from evocomp.data.scenes import scene_examples
from evocomp.labels.hard import HardLabels
from evocomp.labels.labeller import Labeller
from evocomp.labels.store import LabelStore
from evocomp.log import UserError
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring.scorer import CandidateScorer

Row = dict[str, Any]

SEARCH = SearchConfig()
"""The published search."""


@dataclass(frozen=True)
class Share:
    """The questions that a process labels, and the folder of their store."""

    folder: str
    ids: list[int]


def run(device: str = "cpu", repeats: int = 5, samples: int = 96, search: SearchConfig = SEARCH) -> list[Row]:
    """Measure both rows: two processes on one queue, and two independent processes, each against one process.

    Raises:
        UserError: fewer than two cores (or GPUs).
        AssertionError: the labels of two processes differ from those of one.
    """
    devices = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    if devices < 2:
        raise UserError(f"evocomp bench label-processes needs two {'GPUs' if device == 'cuda' else 'cores'}")
    ids = [example.id for example in _examples(samples)]
    with _processes(device, samples, search) as (alone, together), tempfile.TemporaryDirectory() as folder:
        runs: dict[str, list[dict]] = {"one": [], "queue": [], "halves": []}
        for repeat in range(repeats + 1):  # the first is a warm-up: libraries set up kernels for each new matrix size
            for way in list(runs) if repeat % 2 else list(runs)[::-1]:
                store = f"{folder}/{way}-{repeat}"
                if way == "one":
                    done = _measure({alone[0]: Share(store, ids)})
                elif way == "queue":
                    done = _measure({pipe: Share(store, ids) for pipe in together})
                else:
                    parts = {pipe: Share(f"{store}-{k}", ids[k::2]) for k, pipe in enumerate(alone)}
                    done = _measure(parts)
                runs[way] += [done] if repeat else []
            digests = {LabelStore(Path(f"{folder}/{way}-{repeat}")).digest(0) for way in ("one", "queue")}
            assert len(digests) == 1, "the labels of two processes differ from those of one"
    shape = f"nano {samples} questions q={search.population} L={search.generations} chunks of 1"
    return [
        _row("label processes", shape, "two processes, one queue", runs["one"], runs["queue"], device),
        _row("label processes, control", shape, "two independent processes", runs["one"], runs["halves"], device),
    ]


def _row(bench: str, shape: str, ours: str, one: list[dict], two: list[dict], device: str) -> Row:
    row: Row = {"bench": bench, "shape": shape, "baseline": "one process", "ours": ours}
    for name, runs in (("baseline", one), ("ours", two)):
        low, middle, high = quantiles([run["wall"] for run in runs])
        row |= {f"{name}_ms": middle * 1e3, f"{name}_p20_ms": low * 1e3, f"{name}_p80_ms": high * 1e3}
    low, middle, high = quantiles([a["wall"] / b["wall"] for a, b in zip(one, two, strict=True)])
    return row | {
        "ratio": middle,
        "ratio_p20": low,
        "ratio_p80": high,
        # expected ratio of wall times on idle cores, without waiting in the queue: by CPU time of the busier process
        "ratio_by_cpu": statistics.median(a["cpu"] / b["busiest"] for a, b in zip(one, two, strict=True)),
        "cpu_seconds_ratio": statistics.median(b["cpu"] / a["cpu"] for a, b in zip(one, two, strict=True)),
        "waited_ms": 1e3 * statistics.median(run["waited"] for run in two),
        "wall_per_cpu": statistics.median(run["wall_per_cpu"] for run in [*one, *two]),
        "repeats": len(one),
        "clock": "wall",
        **environment(device),
    }


def _measure(shares: dict[Connection, Share]) -> dict[str, float]:
    """Let the processes label their shares at the same time."""
    for pipe, share in shares.items():
        pipe.send(share)
    done = [pipe.recv() for pipe in shares]
    return {
        "wall": max(one["end"] for one in done) - min(one["start"] for one in done),
        "cpu": sum(one["cpu"] for one in done),
        "busiest": max(one["cpu"] for one in done),
        "waited": max(one["waited"] for one in done),
        # time spent waiting in the queue is not work
        "wall_per_cpu": max((one["end"] - one["start"] - one["waited"]) / one["cpu"] for one in done),
    }


# ---------------------------------------------------------------- the processes


@contextmanager
def _processes(device: str, samples: int, search: SearchConfig) -> Iterator[tuple[list[Connection], list[Connection]]]:
    """Pipes to two independent processes and to two processes of one job, all ready to start."""
    context, pipes, started = multiprocessing.get_context("spawn"), [], []
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    for world in (1, 2):
        for rank in range(2):
            ours, theirs = context.Pipe()
            environ = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            if world == 2:
                environ = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            arguments = (theirs, environ, rank, device, samples, search)
            started.append(context.Process(target=_work, args=arguments, daemon=True))
            started[-1].start()
            pipes.append(ours)
    try:
        for pipe in pipes:
            assert pipe.recv() == "ready"
        yield pipes[:2], pipes[2:]
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in started:
            process.join(30)


def _work(pipe: Connection, environ: dict[str, str], number: int, device: str, samples: int, search: SearchConfig):
    """Entry point of a process with the environment variables of its rank, pinned to its own core."""
    os.environ |= environ
    torch.set_num_threads(1)
    if device == "cpu":
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})
    with distributed.process_group():
        _label(pipe, f"cuda:{number}" if device == "cuda" else "cpu", samples, search)


def _label(pipe: Connection, device: str, samples: int, search: SearchConfig):
    """Load the model, then label each share received from the pipe until None is received."""
    mllm = FrozenMLLM.load("nano", device=device)
    examples = _examples(samples)
    known = {example.id: example for example in examples}
    mllm.features(examples)
    scorer = CandidateScorer(mllm)
    pipe.send("ready")
    while (share := pipe.recv()) is not None:
        labels = LabelConfig(target="hard", chunk_size=1)
        rounds = HardLabels(share.ids, scorer, GroupingConfig(), search, labels, seed=0)
        store = LabelStore.open(share.folder, {"bench": "label processes"})
        labeller = Labeller(mllm, scorer, rounds, store, [known[id] for id in share.ids])
        distributed.gather(None)
        start, cpu = time.monotonic(), time.process_time()
        labeller.ensure(0)
        end = time.monotonic()
        pipe.send({"start": start, "end": end, "cpu": time.process_time() - cpu, "waited": labeller.waited})


def _examples(samples: int):
    return scene_examples(seed=616161, start=0, count=samples)[:samples]
