"""README: its commands are understood, its files are there, its two commands are the ones that CI runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import commands, understood

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPET, PRINTED = (re.search(rf"^```{kind}\n(.*?)^```", README, re.M | re.S)[1] for kind in ("python", "text"))
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [words for block in BLOCKS for words in commands(block)]


def test_there_are_the_two_commands():
    setup = r"python3 -m venv \.venv && \. \.venv/bin/activate && pip install .*-c constraints\.txt -e "
    whole = [re.sub(r"\\\n\s*", "", block).strip() for block in BLOCKS]
    fresh = [block for block in whole if re.match(setup, block)]
    job = [block for block in fresh if block.endswith("evocomp train --config nano")]
    test = [block for block in fresh if block.endswith("python -m pytest")]
    assert len(job) == len(test) == 1
    ci = (ROOT / ".ci" / "run").read_text()
    assert "python -m pytest" in ci and "-c constraints.txt" in ci
    extras = re.search(r'-e "?(\.\[[^\]]*\])', test[0])[1]
    assert extras in ci, "CI installs what the second command installs"


def test_the_reader_of_commands_sees_them():
    assert ["train", "--config", "nano"] in COMMANDS and len(COMMANDS) >= 5
    assert commands("a=1 && evocomp eval --run x \\\n  --out y  # why") == [["eval", "--run", "x", "--out", "y"]]
    assert commands("torchrun --nproc-per-node 8 -m evocomp label --seed=1 | tee log") == [["label", "--seed=1"]]
    assert commands("evocomp is a package") == []


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_understood(words, tmp_path, monkeypatch):
    understood(words, ROOT, tmp_path, monkeypatch)


def test_what_is_not_understood_is_seen(tmp_path, monkeypatch):
    for words in (["train", "--config", "experiments/none.yaml"], ["train", "--seeed=1"], ["eval", "--rnu", "x"]):
        with pytest.raises(AssertionError):
            understood(words, ROOT, tmp_path, monkeypatch)


def test_links_and_pictures_lead_somewhere():
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    local = [target for target in targets if "://" not in target]
    assert local
    for target in local:
        assert (ROOT / target).exists(), target


def test_scripts_and_files_in_commands_are_there():
    named = {word for block in BLOCKS for word in re.findall(r"\b(?:experiments|notebooks|tests)/[\w./-]+", block)}
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_modules_that_are_named_are_there():
    for name in re.findall(r"`((?:evocomp|experiments|tests|notebooks)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name


def test_it_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 150


def test_the_snippet_prints_what_is_shown(tmp_path):
    """From an empty folder; tests/test_installed_package.py runs it on the installed wheel."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SNIPPET], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == PRINTED
