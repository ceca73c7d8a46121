"""Benchmarks that lie in local folders, in the formats in which their authors publish them.

    read_task("pope", "/data/pope")

gives the questions as `Example`s; how answers are scored stands in `extra["scoring"]`
(`evocomp.data.scoring`). Prompts end as LLaVA-1.5's evaluation ends them, since a model that answers in
sentences fails every benchmark of short answers. Settings take such a folder as
`data.test_source=pope:/data/pope`.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

from evocomp.data.benchmarks import choices, short_answers
from evocomp.data.example import Example
from evocomp.log import UserError

TASKS: dict[str, Callable[[Path], list[Example]]] = {
    "gqa": short_answers.gqa,
    "pope": short_answers.pope,
    "vqav2": short_answers.vqav2,
    "vizwiz": short_answers.vizwiz,
    "textvqa": short_answers.textvqa,
    "mmbench": choices.mmbench,
    "mmbench_cn": choices.mmbench_cn,
    "mmstar": choices.mmstar,
    "mmmu": choices.mmmu,
    "scienceqa": choices.scienceqa,
}


def read_task(name: str, folder: str | Path) -> list[Example]:
    """All questions of the benchmark `name` that lie in `folder`.

    Raises:
        UserError: no such benchmark or folder, files that are missing or not in the published format, missing
            pictures, no question left.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower(), TASKS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(TASKS)}"
        raise UserError(f"no benchmark is called {name}; {hint}")
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{name}:{folder}: no such folder; download {name} and give the folder that holds its files")
    try:
        examples = TASKS[name](path)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{name}:{folder}: not in the format in which {name} is published ({what})") from None
    if not examples:
        raise UserError(f"{name}:{folder}: no usable question about one picture")
    return examples


def split_source(source: str) -> tuple[str, str] | None:
    """(benchmark, folder) of a source written NAME:FOLDER; None for a path."""
    name, colon, folder = source.partition(":")
    if not colon or "/" in name or "\\" in name or len(name) < 2:  # a drive letter is no benchmark
        return None
    return name, folder
