"""All notebooks run from their percent sources, on a small run."""

import subprocess
import sys
from pathlib import Path

import pytest

from evocomp.cli import main

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))

for extra in ("jupytext", "nbmake", "ipykernel", "pandas"):
    pytest.importorskip(extra, reason="the notebooks need: pip install -e '.[notebooks]'")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """A small run with all the files of a full one."""
    folder = tmp_path_factory.mktemp("notebooks") / "run"
    settings = {
        "run_dir": folder,
        "threads": 1,
        "data.max_samples": 40,
        "data.val_samples": 40,
        "data.test_samples": 40,
        "search.population": 12,
        "search.parents": 4,
        "search.generations": 2,
        "eval.kept": "[48,16,4]",
        "eval.resamples": 50,
        "trainer.max_epochs": 2,
    }
    words = [f"--{key}={value}" for key, value in settings.items()]
    assert main(["train", "--config", str(ROOT / "experiments" / "nano.yaml"), *words]) == 0
    return folder


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs(source, small_run, tmp_path, monkeypatch):
    # as for a user: notebooks and runs in neighbouring folders, and a relative path
    for folder in (small_run, ROOT / "experiments"):
        (tmp_path / folder.name).symlink_to(folder)
    for name, value in {
        "EVOCOMP_RUN": small_run.name,
        "EVOCOMP_QUESTIONS": "3",
        "EVOCOMP_GENERATIONS": "3",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }.items():
        monkeypatch.setenv(name, value)
    notebook = tmp_path / "notebooks" / f"{source.stem}.ipynb"
    notebook.parent.mkdir()
    _run("jupytext", "--set-kernel", "python3", "--to", "ipynb", "--output", str(notebook), str(source))
    # a separate pytest process: the options and markers of this one do not apply to notebooks
    words = ("--nbmake", "--nbmake-timeout=300", "-q", "-p", "no:cacheprovider", "-c", "/dev/null")
    _run("pytest", *words, "--rootdir", str(tmp_path), str(notebook))


def _run(module: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_notebooks_of_the_readme_are_here():
    assert {path.stem for path in SOURCES} == {"quickstart", "groups_and_search", "what_is_kept", "reading_a_run"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing_worth_reusing(source):
    assert not [line for line in source.read_text().splitlines() if line.startswith(("def ", "class "))]
    assert not list(source.parent.glob("*.ipynb")), "notebooks must be percent sources without outputs"
