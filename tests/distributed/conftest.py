import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@dataclass
class Job:
    """Exit codes, returned values and printed text of the ranks of a finished job."""

    codes: list[int | None]
    results: list
    outputs: list[str]

    def succeeded(self) -> "Job":
        assert set(self.codes) == {0}, f"{self.codes}\n" + "\n----\n".join(self.outputs)
        return self


def start_server() -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    return subprocess.Popen(
        [sys.executable, str(HERE / "ranks.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture(scope="session")
def server():
    process = start_server()
    yield process
    process.stdin.close()
    process.wait(30)


def run_job(server, here: Path, world: int, scenario: str, seconds=240, environment=None, **arguments) -> Job:
    """Run a function of scenarios.py on `world` processes."""
    job = {"world": world, "scenario": scenario, "arguments": arguments, "folder": str(here), "seconds": seconds}
    server.stdin.write(json.dumps({**job, "environment": environment or {}}) + "\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())["codes"]
    paths = [here / f"result-{rank}.json" for rank in range(world)]
    results = [json.loads(path.read_text()) if path.exists() else None for path in paths]
    return Job(codes, results, [(here / f"output-{rank}.txt").read_text() for rank in range(world)])


@pytest.fixture(scope="session")
def start_job():
    """`run_job`, for fixtures with a wider scope than a test."""
    return run_job


@pytest.fixture
def ranks(server, tmp_path_factory):
    """ranks(world, scenario, **arguments): `run_job` in a new folder."""
    return lambda *arguments, **options: run_job(server, tmp_path_factory.mktemp("job"), *arguments, **options)
