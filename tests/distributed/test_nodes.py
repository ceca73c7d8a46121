"""Jobs of two torchrun nodes, by the project's own launch script: on loopback, and in two network namespaces."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evocomp.labels.store import LabelStore

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = [
    "--data.max_samples=40",
    "--data.val_samples=0",
    "--data.test_samples=20",
    "--labels.chunk_size=2",
    "--labels.samples_per_epoch=32",
    "--search.population=24",
    "--search.parents=6",
    "--search.generations=2",
    "--optim.batch_size=4",
    "--eval.kept=[16]",
    "--eval.resamples=50",
    "--eval.seeds=1",
    "--logger=none",
    "--threads=1",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=3",
]
pytestmark = pytest.mark.slow


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


class Nodes:
    """Two agents with one worker each, started by torchrun_many_nodes.sh."""

    def __init__(self, folder: Path, prefixes: list[list[str]], variables: list[dict[str, str]], port: int):
        self.run = folder / "run"
        self.logs = [folder / f"node-{node}.txt" for node in range(2)]
        script = [str(ROOT / "experiments/launch/torchrun_many_nodes.sh"), "train", f"--run_dir={self.run}", *SETTINGS]
        common = {"NODES": "2", "PROCESSES": "1", "MAX_RESTARTS": "5", "PORT": str(port)}
        self.agents = [
            subprocess.Popen(
                [*prefix, *script],
                env=environment(**common, **own),
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
            for prefix, own, log in zip(prefixes, variables, self.logs, strict=True)
        ]

    def worker(self, node: int) -> int | None:
        """Process id of the node's worker, if it is alive."""
        listed = subprocess.run(["pgrep", "-P", str(self.agents[node].pid)], capture_output=True, text=True).stdout
        return int(listed.split()[-1]) if listed.split() else None

    def chunks(self, round: int = 0) -> int:
        return len(list(self.run.glob(f"labels/round-{round:04d}/chunk-*.safetensors")))

    def until(self, condition, seconds: float = 600) -> None:
        started = time.monotonic()
        while not condition():
            assert all(agent.poll() is None for agent in self.agents), self.text()
            assert time.monotonic() - started < seconds, self.text()
            time.sleep(0.05)

    def finish(self, seconds: float = 1200) -> float:
        """Wait for the end; returns the elapsed time [s]."""
        started = time.monotonic()
        codes = [agent.wait(seconds) for agent in self.agents]
        assert codes == [0, 0], self.text()
        assert (self.run / "trained.json").exists() and (self.run / "report.json").exists()
        return time.monotonic() - started

    def text(self) -> str:
        return "\n----\n".join(log.read_text()[-4000:] for log in self.logs)

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)


def digests(run: Path) -> list[str]:
    return [LabelStore(run / "labels").digest(round) for round in LabelStore(run / "labels").rounds()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    """Digest of round 0 as one process makes it."""
    run = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "evocomp", "label", f"--run_dir={run}", *SETTINGS]
    subprocess.run(command, env=environment(), check=True, cwd=ROOT)
    return digests(run)[0]


def test_two_nodes_on_loopback_run_to_the_end(tmp_path, alone):
    from ranks import free_port

    nodes = Nodes(tmp_path, [[], []], [{"HEAD": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}] * 2, free_port())
    try:
        nodes.finish()
        assert digests(nodes.run)[0] == alone
    finally:
        nodes.close()


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


@pytest.fixture
def namespaces():
    """Two connected network namespaces: prefixes of commands that run in them, and their variables."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"evo{os.getpid()}n{node}" for node in range(2)]
    try:
        for name in names:
            sh(f"ip netns add {name}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    sh(f"ip link add v0 netns {names[0]} type veth peer name v1 netns {names[1]}")
    for node, name in enumerate(names):
        sh(f"ip -n {name} addr add 10.77.0.{node + 1}/24 dev v{node}")
        sh(f"ip -n {name} link set lo up")
        sh(f"ip -n {name} link set v{node} up")
    yield names
    for name in names:
        sh(f"ip netns del {name}")


@pytest.fixture
def nodes(tmp_path, namespaces):
    prefixes = [["ip", "netns", "exec", name] for name in namespaces]
    variables = [
        {
            "HEAD": "10.77.0.1",
            "IS_HEAD": str(int(node == 0)),
            "LOCAL_ADDR": f"10.77.0.{node + 1}",
            "GLOO_SOCKET_IFNAME": f"v{node}",
        }
        for node in range(2)
    ]
    job = Nodes(tmp_path, prefixes, variables, 29512)
    job.namespaces = namespaces
    yield job
    job.close()


def labelling(nodes: Nodes) -> bool:
    return 2 <= nodes.chunks() < 20


def training(nodes: Nodes) -> bool:
    return (nodes.run / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("phase", [labelling, training])
def test_a_killed_worker_comes_back(nodes, alone, phase):
    nodes.until(lambda: phase(nodes))
    os.kill(nodes.worker(1), signal.SIGKILL)
    seconds = nodes.finish()
    assert digests(nodes.run)[0] == alone
    print(f"\nworker killed in {phase.__name__}: done {seconds:.0f} s later")


@pytest.mark.parametrize("phase", [labelling, training])
def test_a_cut_link_is_survived(nodes, alone, phase):
    nodes.until(lambda: phase(nodes))
    sh(f"ip -n {nodes.namespaces[1]} link set v1 down")
    time.sleep(45)
    sh(f"ip -n {nodes.namespaces[1]} link set v1 up")
    seconds = nodes.finish()
    assert digests(nodes.run)[0] == alone
    print(f"\nlink cut for 45 s in {phase.__name__}: done {seconds:.0f} s after it was back")
