"""Every configuration in experiments/ loads, can start, and has a head comment with its purpose and command."""

import re
from pathlib import Path

import pytest
import yaml

from evocomp.config.load import load
from evocomp.data.scenes import SPECS
from tests.commands import commands, understood

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
FILES = [path for path in sorted(EXPERIMENTS.glob("*.yaml")) if "run_dir:" in path.read_text()]
STUDY = yaml.safe_load((EXPERIMENTS / "study" / "runs.yaml").read_text())["runs"]
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def head(path: Path) -> str:
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.lstrip("# ") for line in lines[:end])


def test_the_main_configuration_exists():
    assert {"nano.yaml", "nano_published.yaml"} <= {path.name for path in FILES}


def can_begin(config) -> None:
    from evocomp.training.build import check_trainer

    check_trainer(config.trainer)
    if config.model.name in ("nano", "nano576"):
        assert max(config.eval.kept) <= SPECS[config.data.scenes].tokens_per_side ** 2
    if config.data.source == "scenes":
        asked = config.labels.samples_per_epoch or config.labels.passes * config.data.max_samples
        assert asked >= config.optim.batch_size


@each
def test_configurations_load_and_can_start(path):
    can_begin(load([path]))


@pytest.mark.parametrize("name", STUDY)
def test_runs_of_the_study_load_and_can_start(name):
    can_begin(load([EXPERIMENTS / STUDY[name]["config"]], STUDY[name].get("set", [])))


@each
def test_head_comments_have_cost_and_valid_commands(path, tmp_path, monkeypatch):
    text = head(path)
    assert re.search(r"\bexpect|hours|minutes", text, re.I), "what it costs"
    found = commands(text)
    assert any(f"experiments/{path.name}" in words for words in found)
    for number, words in enumerate(found):
        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patch:
            understood(words, ROOT, folder, patch)


def test_run_folders_are_distinct():
    folders = [load([path]).run_dir for path in FILES]
    assert len(set(folders)) == len(folders)
