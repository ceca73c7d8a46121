"""Every file in experiments/ is a whole, valid run with a head comment that says what it is."""

import re
from pathlib import Path

import pytest

from evocomp.config.load import load, split_arguments
from evocomp.data.scenes import SceneSpec

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
FILES = sorted(EXPERIMENTS.glob("*.yaml"))
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def head(path: Path) -> str:
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.lstrip("# ") for line in lines[:end])


def test_the_main_job_is_there():
    assert "nano.yaml" in [path.name for path in FILES]


@each
def test_it_loads(path):
    config = load([path])
    from evocomp.training.build import check_trainer

    check_trainer(config.trainer)
    if config.model.name == "nano":
        assert max(config.eval.kept) <= SceneSpec().tokens_per_side ** 2


@each
def test_it_can_be_batched(path):
    config = load([path])
    if config.data.source == "scenes":
        assert config.labels.passes * config.data.max_samples >= config.optim.batch_size


@each
def test_its_head_says_what_to_expect_and_how_to_run_it(path):
    text = head(path)
    assert re.search(r"\bexpect", text, re.I), "what it costs and shows"
    # a command begins its line, with a launcher before it perhaps, and may go on in the next
    commands = re.findall(r"^(?:torchrun .* -m )?(evocomp (?:train|label) .*)$", re.sub(r"\\\n", " ", text), re.M)
    assert any(f"experiments/{path.name}" in command for command in commands)
    for command in commands:
        files, settings = split_arguments(command.split()[2:])
        load([EXPERIMENTS.parent / file for file in files], settings)


def test_no_two_runs_share_a_folder():
    folders = [load([path]).run_dir for path in FILES]
    assert len(set(folders)) == len(folders)
