"""Processes for idle cores: their number and their end, and that results do not depend on them."""

import os
import subprocess
import sys

import numpy as np
import pytest

from evocomp import launch
from evocomp.cli import main
from evocomp.evaluation.outcome import Outcome
from evocomp.evaluation.run import own_share, read_rows, together
from evocomp.labels.store import LabelStore
from evocomp.launch import beside, idle_processes, launched
from tests.training.test_run import PLUS, QUICK

CPU = {"accelerator": "cpu"}


@pytest.fixture
def machine(monkeypatch):
    """A machine with `cores` cores, some of them busy."""
    for name in launch._PLACED_BY:
        monkeypatch.delenv(name, raising=False)

    def of(cores: int, busy: float = 0.0) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.setattr(os, "getloadavg", lambda: (busy, busy, busy), raising=False)

    return of


@pytest.mark.parametrize(
    ("cores", "busy", "batch", "expected"),
    [(1, 0, 32, 1), (2, 0, 32, 2), (2, 0.3, 32, 2), (2, 1.2, 32, 1), (2, 9, 32, 1), (64, 0, 32, 4), (3, 0, 32, 2)]
    + [(4, 0, 6, 3), (4, 0, 7, 1), (3, 0, 6, 3)],
)
def test_one_process_for_each_idle_core_that_shares_a_batch_evenly(machine, cores, busy, batch, expected):
    machine(cores, busy)
    assert idle_processes(CPU, 0, batch) == expected


@pytest.mark.parametrize(
    ("trainer", "threads"),
    [({}, 0), ({"accelerator": "gpu"}, 0), ({**CPU, "devices": 2}, 0), ({**CPU, "strategy": "ddp"}, 0), (CPU, 1)],
)
def test_one_process_if_the_settings_set_devices_or_a_gpu(machine, trainer, threads):
    machine(4)
    assert idle_processes(trainer, threads, 32) == 1


@pytest.mark.parametrize("name", launch._PLACED_BY)
def test_one_process_under_a_launcher_or_with_set_threads(machine, monkeypatch, name):
    machine(4)
    monkeypatch.setenv(name, "1")
    assert idle_processes(CPU, 0, 32) == 1


def test_the_others_end_with_rank_0_and_leave_the_environment(monkeypatch):
    started = []
    popen = subprocess.Popen

    def sleeper(command, **options):
        assert options["env"]["RANK"] == "1" and options["env"]["WORLD_SIZE"] == "2"
        process = popen([sys.executable, "-c", "import time; time.sleep(600)"], **options)
        started.append(process)
        return process

    monkeypatch.setattr(launch.subprocess, "Popen", sleeper)
    before = dict(os.environ)
    with pytest.raises(KeyError), beside(2, ["train"]):
        assert launched() == 2
        raise KeyError
    assert started[0].returncode is not None
    assert dict(os.environ) == before and launched() == 1


def test_shares_of_the_questions_are_full_images_and_are_merged_in_order(questions):
    shares = [own_share(questions, rank, 2) for rank in range(2)]
    assert sorted(sum(shares, [])) == list(range(len(questions)))
    images = [{questions[i].image_id for i in own} for own in shares]
    assert images[0] and images[1] and not images[0] & images[1]
    scores = np.random.default_rng(0).random(len(questions))
    words = [str(score) for score in scores]
    parts = [(own, [Outcome("a", 4, scores[own], [words[i] for i in own])]) for own in shares]
    (whole,) = together(parts)
    assert np.array_equal(whole.correct, scores) and whole.answers == words
    refused = Outcome("a", 4, np.zeros(0), not_applicable="it needs attention")
    assert together([parts[0], (shares[1], [refused])]) == [refused]


@pytest.mark.slow
def test_two_processes_give_the_labels_and_about_the_table_of_one(tmp_path):
    quick = [word for word in [*QUICK, *PLUS] if not word.startswith(("threads", "optim.batch_size"))]
    words = [f"--{word}" for word in [*quick, "optim.batch_size=8", "logger=none"]]
    assert main(["train", *words, f"--run_dir={tmp_path}/one", "--threads=1"]) == 0
    environment = {name: value for name, value in os.environ.items() if name not in launch._PLACED_BY}
    idle = "import os; os.getloadavg = lambda: (0, 0, 0); os.sched_getaffinity = lambda pid: {0, 1}; import sys; "
    command = f"{idle}from evocomp.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", command, "train", *words, f"--run_dir={tmp_path}/two"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes share the work" in done.stderr
    one, two = (LabelStore(tmp_path / name / "labels") for name in ("one", "two"))
    assert one.digest(0) == two.digest(0)
    rows = [read_rows(tmp_path / name / "report.json") for name in ("one", "two")]
    one, two = ({(row["method"], row["kept"]): row for row in own} for own in rows)
    assert one.keys() == two.keys()
    for (method, kept), row in one.items():
        if method != "evocomp":  # rounding changes the trained weights, and thus some answers
            assert (row["accuracy"], row["n"]) == (two[method, kept]["accuracy"], two[method, kept]["n"]), method
