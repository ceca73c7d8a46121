"""Commands in documents, parsed by the real command line without starting the work."""

import importlib
import re
import shlex
from pathlib import Path

from evocomp import cli

# functions that the commands call after parsing
WORK = {
    "evocomp.training.build": ("run", "label_only"),
    "evocomp.evaluation.run": ("evaluate_run",),
    "evocomp.bench.record": ("run_bench",),
    "evocomp.inference.command": ("answer_from_command_line",),
    "evocomp.data.conversations": ("write_scenes",),
}


def commands(text: str) -> list[list[str]]:
    """The words after `evocomp` (or `-m evocomp`, or a launch script) of every command in the text."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in re.split(r"&&|\||;", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                continue
            starts = [i for i, word in enumerate(words) if word == "evocomp" or word.startswith("experiments/launch/")]
            if starts and starts[0] + 1 < len(words) and words[starts[0] + 1] in cli.VERBS:
                found.append(words[starts[0] + 1 :])
    return found


def understood(words: list[str], root: Path, folder: Path, monkeypatch) -> None:
    """Assert that the command line accepts the words in a checkout at `root`; nothing is run.

    Results of earlier commands (runs, images) are created in `folder` as empty files.
    """
    monkeypatch.chdir(folder)
    for name in ("experiments", "evocomp"):
        if not (folder / name).exists():
            (folder / name).symlink_to(root / name)
    options = dict(zip(words, words[1:], strict=False))
    made_by_others = (
        ("--run", "config.yaml", "run_dir: a\n"),
        ("--run", "compressor/config.json", "{}"),
        ("--image", "", ""),
    )
    for option, file, content in made_by_others:
        if option in options:
            made = folder / options[option] / file
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(content)
    called = []
    for module, names in WORK.items():
        for name in names:
            monkeypatch.setattr(importlib.import_module(module), name, lambda *_, **__: called.append(1) or 0)
    if words[0] == "train":
        # the panel needs a trained run
        monkeypatch.setattr(importlib.import_module("evocomp.evaluation.run"), "evaluate_run", lambda *_, **__: [])
    assert cli.main(words) == 0, words
    assert called or words[0] in ("config",) or "--estimate" in words, words
