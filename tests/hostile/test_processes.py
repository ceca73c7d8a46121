"""Processes of a job: none outlives the one that started it, none is started in vain, no socket is open to all."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from one_line import refused

from evocomp.distributed.heartbeat import _listen_at
from evocomp.training.build import check_devices

CHILD = "from evocomp.launch import end_with_parent as e; e(); print(1, flush=True); import time; time.sleep(60)"
PARENT = """
import os, subprocess, sys
place = {"EVOCOMP_PROCESSES": "2", "RANK": "1", "EVOCOMP_PARENT": str(os.getpid())}
if sys.argv[2] == "torchrun":
    place = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}
if sys.argv[2] == "lightning":
    place = {"LOCAL_RANK": "1"}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | place, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel does this on Linux")
@pytest.mark.parametrize("launcher", ["beside", "torchrun", "lightning"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_ends_with_its_parent(launcher, number):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    command = [sys.executable, "-c", PARENT, CHILD, launcher]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert lives(child)
        parent.send_signal(number)
        parent.wait()
    until = time.monotonic() + 10
    while lives(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not lives(child)


@pytest.mark.parametrize("devices", [10**6, 0, -2, (os.cpu_count() or 1) + 1])
def test_devices_that_the_machine_does_not_have(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: check_devices(devices, "cpu"), "trainer.devices=")


@pytest.mark.parametrize("devices", [1, -1, "auto", None])
def test_devices_that_it_has(devices):
    check_devices(devices, "cpu")


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs /proc/net/tcp")
def test_the_store_of_a_job_listens_at_one_address_only():
    store = _listen_at("127.0.0.1")
    client = torch.distributed.TCPStore("127.0.0.1", store.port, None, False, wait_for_workers=False)
    client.set("a", "1")
    assert store.get("a") == b"1"
    found = []
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        found += [row[1] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == store.port]
    assert [address.rpartition(":")[0] for address in found] == ["0100007F"]
