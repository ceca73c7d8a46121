"""The launch recipes as far as a machine without Slurm and Kubernetes can tell: syntax, arguments, what a stop does."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.commands import commands, understood

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = [LAUNCH / name for name in ("torchrun_one_node.sh", "torchrun_many_nodes.sh", "slurm.sbatch")]
SERVICE, JOB = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
HEADS = [
    words
    for path in [*SCRIPTS, LAUNCH / "kubernetes.yaml", LAUNCH / "README.md"]
    for words in commands(path.read_text().replace("#", " ").replace("`", " ; ").replace("SHARED_FOLDER", "runs/a"))
    if "--config" in words and "FILE" not in words
]
HEADS.append(CONTAINER["args"][0].split("torchrun_many_nodes.sh")[1].split())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_can_be_started(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) and script.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("script", SCRIPTS[:2], ids=lambda path: path.name)
def test_torchrun_knows_its_options(script, tmp_path):
    """What the script would start, as torchrun's own parser reads it."""
    fake(tmp_path, "torchrun", 'printf "%s\\n" "$@"')
    variables = {"HEAD": "node0", "NODES": "4", "PROCESSES": "8", "IS_HEAD": "1", "LOCAL_ADDR": "10.0.0.1"}
    started = subprocess.run(
        [script, "train", "--seed=3"], env=path_with(tmp_path, **variables), capture_output=True, text=True, check=True
    )
    arguments = get_args_parser().parse_args(started.stdout.splitlines())
    assert arguments.module and arguments.training_script == "evocomp" and arguments.nproc_per_node == "8"
    assert arguments.training_script_args == ["train", "--seed=3", "--trainer.strategy=ddp"]
    if "many" in script.name:
        assert (arguments.nnodes, arguments.rdzv_endpoint) == ("4", "node0:29512")
        assert arguments.local_addr == "10.0.0.1" and "is_host=1" in arguments.rdzv_conf


@pytest.mark.parametrize("words", HEADS, ids=" ".join)
def test_commands_in_their_heads_are_understood(words, tmp_path, monkeypatch):
    understood(words, ROOT, tmp_path, monkeypatch)


def test_there_are_commands_in_their_heads():
    assert len(HEADS) >= 3


def test_the_kubernetes_job_fits_its_service_and_the_script():
    assert JOB["apiVersion"] == "batch/v1" and JOB["spec"]["completionMode"] == "Indexed"
    assert SERVICE["spec"]["clusterIP"] == "None" and POD["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    variables = {one["name"]: one["value"] for one in CONTAINER["env"]}
    assert variables["HEAD"] == f"{JOB['metadata']['name']}-0.{SERVICE['metadata']['name']}"
    assert int(variables["NODES"]) == JOB["spec"]["completions"] == JOB["spec"]["parallelism"]
    assert int(variables["PROCESSES"]) == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    read = (LAUNCH / "torchrun_many_nodes.sh").read_text()
    assert all(name in read for name in ("HEAD", "NODES", "PROCESSES", "IS_HEAD"))
    mounts = {one["name"] for one in CONTAINER["volumeMounts"]}
    assert mounts == {one["name"] for one in POD["volumes"]}


@pytest.mark.parametrize("index", ["0", "1"])
def test_the_pod_of_index_0_is_the_head(index, tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "launch").mkdir()
    fake(tmp_path / "experiments" / "launch", "torchrun_many_nodes.sh", 'echo "IS_HEAD=$IS_HEAD $*"')
    command = [*CONTAINER["command"], *CONTAINER["args"]]
    environment = {**os.environ, "JOB_COMPLETION_INDEX": index}
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"IS_HEAD={int(index == '0')} train --config experiments/llava15_7b.yaml")


# ------------------------------------------------------------ Slurm, with stand-ins for its two commands


def fake(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def path_with(folder: Path, **variables: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}


def batch_job(folder: Path, step: str) -> subprocess.Popen:
    fake(folder, "srun", f'echo "$@" > {folder}/step\n{step}')
    fake(folder, "scontrol", f'if [ "$1" = show ]; then printf "n7\\nn8\\n"; else echo "$@" >> {folder}/asked; fi')
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "55", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_SUBMIT_DIR": str(ROOT)}
    return subprocess.Popen([LAUNCH / "slurm.sbatch", "train", "--seed=3"], env=path_with(folder, **slurm))


def test_a_time_limit_stops_the_step_and_queues_the_job_again(tmp_path):
    # as torchrun does: it passes the signal on, waits for its workers, and ends with an error
    step = f"trap 'sleep 0.5; touch {tmp_path}/stopped; exit 2' TERM\nwhile :; do sleep 0.05; done"
    job = batch_job(tmp_path, step)
    while not (tmp_path / "step").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(job.pid, signal.SIGTERM)  # --signal=B:TERM@300 sends it to the batch script alone
    assert job.wait(30) == 2 and (tmp_path / "stopped").exists()
    assert (tmp_path / "asked").read_text() == "requeue 55\n"
    started = (tmp_path / "step").read_text()
    assert f"{LAUNCH}/torchrun_many_nodes.sh train --seed=3" in started and "-u SLURM_NTASKS" in started


@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_ends_by_itself_is_not_queued_again(tmp_path, code):
    assert batch_job(tmp_path, f"exit {code}").wait(30) == code
    assert not (tmp_path / "asked").exists()


def test_slurm_is_asked_for_a_signal_to_the_script_and_for_leave_to_requeue():
    directives = re.findall(r"^#SBATCH (\S+)", SCRIPTS[2].read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=B:TERM@300", "--open-mode=append", "--ntasks-per-node=1"} <= set(directives)
