"""Paired timing of implementations: interleaved, after warm-up, with quantiles and a comparison of the results."""

import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

import evocomp
from evocomp.log import logger

# Shorter work is repeated within a sample, because a time slice of the scheduler takes milliseconds.
MIN_SAMPLE_SECONDS = 0.03
# Written before each timed GPU sample to flush the L2 cache, which is smaller (H200: 50 MB).
FLUSH_BYTES = 256 * 2**20
# With the clock "device", the GPU spins for about this long before a sample, while the host queues it.
SPIN_CYCLES = 8_000_000

Clock = Literal["wall", "process", "device"]
Work = Callable[[], Any]
Agree = Callable[[Any, Any], dict[str, Any] | None]


def compare(
    bench: str,
    shape: str,
    baseline: tuple[str, Work],
    ours: tuple[str, Work],
    agree: Agree,
    device: torch.device | str = "cpu",
    repeats: int = 5,
    clock: Clock = "wall",
) -> dict[str, Any]:
    """One row of `compare_all`."""
    return compare_all(bench, shape, baseline, [ours], agree, device, repeats, clock)[0]


def compare_all(
    bench: str,
    shape: str,
    baseline: tuple[str, Work],
    ways: Sequence[tuple[str, Work]],
    agree: Agree,
    device: torch.device | str = "cpu",
    repeats: int = 5,
    clock: Clock = "wall",
) -> list[dict[str, Any]]:
    """Time several implementations in alternation and return a row for each against a common baseline.

    Args:
        bench: what is measured, e.g. "cosine separation, forward + backward".
        shape: the sizes as text, e.g. "B=2 N=2880 D=256".
        baseline: (name, function without arguments that returns its result).
        ways: the same for each other implementation.
        agree: called with the baseline's result of the warm-up and that of each implementation; raises AssertionError
            if they differ; the values that it returns are added to the row.
        device: device that the work runs on.
        repeats: timed rounds, at least 5 for a table.
        clock: "process" is the CPU time of this process, which other jobs affect less; CPUs only. "device" excludes the
            launch overhead of the host for short work, which is queued while the GPU spins.

    Returns:
        rows with "baseline_ms" and "ours_ms" (medians), their 20 % and 80 % quantiles ("..._p20_ms" and
        "..._p80_ms"), "ratio" (median over the rounds of baseline / ours; above 1 is faster), "ratio_p20",
        "ratio_p80", the names, the shape and `environment(device)`.

    Raises:
        AssertionError: results differ; no time is reported for a wrong result.
    """
    device = torch.device(device)
    expected = baseline[1]()
    found = [agree(expected, work()) for _, work in ways]
    del expected
    works = [baseline[1], *(work for _, work in ways)]
    rounds = [_rounds(work, device, clock) for work in works]
    times: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats):
        order = range(len(works)) if repeat % 2 == 0 else reversed(range(len(works)))  # the order alternates too
        for i in order:
            times[i].append(_sample(works[i], rounds[i], device, clock))
    settings = {"repeats": repeats, "clock": clock, **environment(device)}
    names = {"bench": bench, "shape": shape, "baseline": baseline[0]}
    return [
        names | {"ours": name} | _summary(times[0], own) | settings | (more or {})
        for (name, _), own, more in zip(ways, times[1:], found, strict=True)
    ]


def _summary(baseline: list[float], ours: list[float]) -> dict[str, float]:
    """Medians, quantiles and ratios of paired samples [s]."""
    row: dict[str, float] = {}
    for name, values in (("baseline", baseline), ("ours", ours)):
        low, middle, high = quantiles(values)
        row |= {f"{name}_ms": middle * 1e3, f"{name}_p20_ms": low * 1e3, f"{name}_p80_ms": high * 1e3}
    low, middle, high = quantiles([a / b for a, b in zip(baseline, ours, strict=True)])
    return row | {"ratio": middle, "ratio_p20": low, "ratio_p80": high}


def measure(work: Work, device: torch.device | str = "cpu", clock: Clock = "wall") -> float:
    """Seconds of one call: the minimum of three samples, which is least affected by other jobs."""
    device = torch.device(device)
    work()
    rounds = _rounds(work, device, clock)
    return min(_sample(work, rounds, device, clock) for _ in range(3))


def ceilings(device: torch.device | str) -> tuple[float, float]:
    """Measured peak rates: FLOP/s of a large matrix product in bf16 (CPUs: fp32), byte/s read and written by a copy."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    size, rounds = (8192, 20) if cuda else (512, 1)
    matrices = torch.randn(2, size, size, device=device).to(torch.bfloat16 if cuda else torch.float32)
    product = measure(lambda: [matrices[0] @ matrices[1] for _ in range(rounds)], device) / rounds
    source = torch.empty(2**30 if cuda else 2**26, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = measure(lambda: [target.copy_(source) for _ in range(rounds)], device) / rounds
    return 2 * size**3 / product, 2 * source.numel() / copy


def graphed(work: Work) -> Work:
    """`work` as a CUDA graph: replays have no launch overhead per kernel; each replay overwrites the result.

    Raises:
        RuntimeError: `work` synchronises with the host.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = work()

    def replay() -> Any:
        graph.replay()
        return answer

    return replay


def host_waits(work: Work) -> int:
    """Number of times that work() makes the host wait for the GPU, by the profiler."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        work()
    names = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    return sum(event.count for event in trace.key_averages() if event.key in names)


def each(works: Iterable[Callable[[], Iterable[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of every function as they are measured; a failure is logged, and the others still run.

    Raises:
        AssertionError, RuntimeError: the first failure, after all others have run.
    """
    failed = None
    for work in works:
        try:
            yield from work()
        except (AssertionError, RuntimeError) as error:
            logger.error("no row: %s", error)
            failed = failed or error
    if failed is not None:
        raise failed


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles; a single value is returned three times."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], statistics.median(values), tenths[7]


def environment(device: torch.device | str) -> dict[str, Any]:
    """Environment of a measurement: device, threads, versions, commit (EVOCOMP_COMMIT, else that of the checkout)."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "python": platform.python_version(),
        "evocomp": evocomp.__version__,
        "commit": _commit(),
    }


@cache
def _commit() -> str | None:
    if named := os.environ.get("EVOCOMP_COMMIT"):
        return named  # set for copied sources, which may lie over an older checkout
    folder = Path(evocomp.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return found.stdout.strip() or None


def peak_memory(work: Work, device: torch.device | str = "cpu") -> int:
    """Peak number of bytes that torch's allocator held during work(), above the number before."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _rounds(work: Work, device: torch.device, clock: str) -> int:
    """Number of calls in one timed sample, after warm-up; one on a GPU, where each starts with a cold cache."""
    if _sample(work, 1, device, clock) >= 10 * MIN_SAMPLE_SECONDS:
        return 1  # long work needs no further warm-up: it has been called once before
    for _ in range(2):
        work()
    if device.type == "cuda":
        return 1
    once = min(_sample(work, 1, device, clock) for _ in range(3))
    return max(1, math.ceil(MIN_SAMPLE_SECONDS / once))


def _sample(work: Work, rounds: int, device: torch.device, clock: str) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        now = time.process_time if clock == "process" else time.perf_counter
        start = now()
        for _ in range(rounds):
            work()
        return (now() - start) / rounds
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if clock == "device":
        torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3
