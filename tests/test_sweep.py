"""A sweep of four tiny runs that is killed in the second: the same command goes on, and the table is the same."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evocomp.log import UserError
from experiments.sweep import accuracy, combinations

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = """
recipe=published labels.dtype=model labels.refresh=none labels.passes=1 optim.muon_dtype=bfloat16 optim.batch_size=4
data.max_samples=8 data.val_samples=8 search.population=6 search.parents=3 search.generations=1
eval.kept=[16,4] eval.max_new_tokens=1 trainer.max_epochs=2 trainer.accelerator=cpu threads=1
""".split()


def start(out: Path) -> subprocess.Popen:
    vary = ["--vary", "optim.lr=1e-3,2e-3", "--vary", "seed=0,1"]
    command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), *vary, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, *(f"--{word}" for word in SETTINGS)], env=environment, text=True, stdout=-1)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(3000):
        if path.exists():
            return
        assert process.poll() is None, f"the sweep ended before {path.name} was there"
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    killed = start(tmp_path)
    first, second = tmp_path / "optim.lr=1e-3_seed=0", tmp_path / "optim.lr=1e-3_seed=1"
    try:
        wait_for(second / "labels" / "meta.json", killed)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    finished = (first / "trained.json").read_bytes(), (first / "trained.json").stat().st_mtime_ns
    assert not (second / "trained.json").exists()
    again = start(tmp_path)
    best = json.loads(again.communicate(timeout=600)[0])
    assert again.returncode == 0
    assert finished == ((first / "trained.json").read_bytes(), (first / "trained.json").stat().st_mtime_ns)
    with open(tmp_path / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["optim.lr"], row["seed"]) for row in sorted(rows, key=lambda row: row["run_dir"])] == [
        ("1e-3", "0"),
        ("1e-3", "1"),
        ("2e-3", "0"),
        ("2e-3", "1"),
    ]
    for row in rows:
        assert float(row["accuracy"]) == pytest.approx(accuracy(Path(row["run_dir"])), abs=5e-5)
    assert best == rows[0] and float(best["accuracy"]) == max(float(row["accuracy"]) for row in rows)


def test_what_cannot_be_swept_is_told(tmp_path):
    for text in ("optim.lr", "optim.lr=", "optim.lr=1,,2"):
        with pytest.raises(UserError, match="write KEY=VALUE,VALUE"):
            combinations([text])
    with pytest.raises(UserError, match="holds no finished run"):
        accuracy(tmp_path)
