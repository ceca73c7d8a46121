"""torchrun starts a job again after one of its processes was killed: the same labels come of it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from evocomp.labels.store import LabelStore

pytestmark = pytest.mark.slow
SETTINGS = ["recipe=plus", "labels.dtype=model", "data.max_samples=80", "data.val_samples=6", "data.test_samples=0"]
SETTINGS += ["labels.chunk_size=4", "labels.credit_masks=16", "threads=1"]


def label(folder, *before: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *before, "-m", "evocomp", "label", *SETTINGS, f"run_dir={folder}"]
    output = open(f"{folder}.log", "w")  # noqa: SIM115 - belongs to the process
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def worker(agent: int, rank: int) -> int:
    with open(f"/proc/{agent}/task/{agent}/children") as file:
        children = [int(pid) for pid in file.read().split()]
    for pid in children:
        with open(f"/proc/{pid}/environ") as file:
            if f"RANK={rank}" in file.read().split("\0"):
                return pid
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_started_again(tmp_path, rank):
    assert label(tmp_path / "alone").wait(300) == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2")
    job, round = label(tmp_path / "job", *torchrun), tmp_path / "job" / "labels" / "round-0000"
    until = time.monotonic() + 300
    while len(list(round.glob("chunk-*.safetensors"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(worker(job.pid, rank), signal.SIGKILL)
    assert job.wait(300) == 0
    alone, restarted = (LabelStore(tmp_path / name / "labels").digest(0) for name in ("alone", "job"))
    assert alone == restarted
    assert "Traceback" not in (tmp_path / "job.log").read_text()
