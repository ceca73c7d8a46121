"""Starts the ranks of small jobs: a server that imports torch and evocomp once and forks.

It reads one job per line from standard input, as JSON: {"world", "scenario", "arguments", "folder", "seconds"}, and
writes one line: {"codes": exit code of each rank (negative: killed by that signal, null: killed after the timeout)}.
The return value of the scenario (a function in scenarios.py) on rank k is saved in folder/result-k.json, its output in
folder/output-k.txt.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def become_rank(job: dict, rank: int, port: int) -> None:
    """In the child: environment as torchrun sets it, output into files, then the scenario. Does not return."""
    folder = Path(job["folder"])
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    world = str(job["world"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= job.get("environment", {})
    code = 1
    try:
        import scenarios

        result = getattr(scenarios, job["scenario"])(**job["arguments"])
        (folder / f"result-{rank}.json").write_text(json.dumps(result))
        code = result.get("code", 0) if isinstance(result, dict) else 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.exit(code)


def run(job: dict) -> dict:
    port, children = free_port(), []
    for rank in range(job["world"]):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            become_rank(job, rank, port)
        children.append(child)
    Path(job["folder"], "pids.json").write_text(json.dumps(children))
    return {"codes": wait(children, job["seconds"])}


def wait(children: list[int], seconds: float) -> list[int | None]:
    codes: list[int | None] = [None] * len(children)
    left, until = set(range(len(children))), time.monotonic() + seconds
    while left:
        for rank in sorted(left):
            pid, status = os.waitpid(children[rank], os.WNOHANG)
            if pid:
                codes[rank] = os.waitstatus_to_exitcode(status)
                left.discard(rank)
        if left and time.monotonic() > until:
            for rank in left:
                os.kill(children[rank], signal.SIGKILL)
                os.waitpid(children[rank], 0)
            break
        time.sleep(0.02)
    return codes


def main() -> None:
    import torch

    torch.set_num_threads(1)
    import lightning  # noqa: F401

    import evocomp.cli
    import evocomp.training.build  # noqa: F401  (slow imports)

    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
