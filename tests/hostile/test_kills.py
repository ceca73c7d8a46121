"""Runs that are killed at random moments and started again end in the same bytes as one that is left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from evocomp.labels.store import LabelStore

pytestmark = pytest.mark.slow
KILLS = 50
SETTINGS = [
    "recipe=plus",
    "labels.dtype=model",
    "optim.muon_dtype=bfloat16",
    "data.max_samples=64",
    "data.val_samples=6",
    "data.test_samples=60",
    "labels.chunk_size=8",
    "labels.credit_masks=16",
    "labels.samples_per_refresh=24",
    "labels.flat=0.001",
    "labels.refresh_start=1",
    "optim.batch_size=8",
    "eval.kept=[16,4]",
    "eval.resamples=50",
    "logger=none",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=3",
]


def command(folder: Path, processes: int) -> list[str]:
    words = ["train", *SETTINGS, f"run_dir={folder}"]
    if processes == 1:
        return [sys.executable, "-m", "evocomp", *words]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, "-m", "evocomp", *words]


def start(folder: Path, processes: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = open(folder.with_suffix(".log"), "a")  # noqa: SIM115 - belongs to the process
    return subprocess.Popen(command(folder, processes), env=environment, stdout=output, stderr=output)


def finished(folder: Path, processes: int) -> float:
    started = time.monotonic()
    assert start(folder, processes).wait(900) == 0, folder.with_suffix(".log").read_text()[-2000:]
    return time.monotonic() - started


def results(folder: Path) -> tuple:
    store = LabelStore(folder / "labels")
    weights = load_file(folder / "compressor" / "model.safetensors")
    labels = {round: store.digest(round) for round in store.rounds()}
    rows = (folder / "report.json").read_bytes()
    return labels, {name: value.numpy().tobytes() for name, value in weights.items()}, rows


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_end_in_the_same_bytes(tmp_path, processes):
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    print(f"KILL_SEED={seed}")
    chance = random.Random(seed)
    whole = tmp_path / "whole"
    seconds = finished(whole, processes)
    kills, number = 0, 0
    while kills < KILLS:
        number += 1
        folder = tmp_path / f"killed-{number}"
        for _ in range(chance.randint(1, 5)):
            run = start(folder, processes)
            try:
                run.wait(chance.uniform(0.1, 1.0) * seconds)
                break
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.wait()
                kills += 1
        finished(folder, processes)
        assert results(folder) == results(whole), (seed, number)
        log = folder.with_suffix(".log").read_text()
        assert "Traceback" not in log, log[-2000:]
