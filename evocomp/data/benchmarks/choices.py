"""MMBench, MMStar, MMMU, ScienceQA: questions with lettered options.

Each question is asked once, with the options in the order given. MMBench's CircularEval asks again with the
options rotated and counts a question as right only if all are; its scores are lower and not to be compared
with these.
"""

import ast
import re
from pathlib import Path
from typing import Any

from evocomp.data.benchmarks.files import (
    PackedPictures,
    PictureFolder,
    find,
    find_all,
    letters,
    read_table,
)
from evocomp.data.example import Example, stable_id
from evocomp.data.json_records import read_json
from evocomp.log import logger

LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
OPEN = "\nAnswer the question using a single word or phrase."


def mmbench(folder: Path) -> list[Example]:
    """`mmbench_dev_*.tsv` or `MMBench_DEV_EN*.tsv`, pictures inside as base64. arXiv 2307.06281."""
    return _mmbench("mmbench", find(folder, "mmbench_dev_2*.tsv", "*DEV_EN*.tsv", "*_en_*.tsv"), LETTER)


def mmbench_cn(folder: Path) -> list[Example]:
    """`mmbench_dev_cn_*.tsv` or `MMBench_DEV_CN*.tsv`."""
    return _mmbench("mmbench_cn", find(folder, "mmbench_dev_cn_*.tsv", "*DEV_CN*.tsv", "*_cn_*.tsv"), LETTER_CN)


def _mmbench(name: str, table: Path, ending: str) -> list[Example]:
    unpack = PackedPictures(table)
    rows = read_table([table])
    packed = {row["index"]: row["image"] for row in rows}
    examples = []
    for row in rows:
        index = row["index"]
        # a row may name the row that holds its picture
        at = row["image"] if row["image"] in packed else index
        options = _columns(row)
        question = "\n".join(part for part in (row.get("hint"), row["question"]) if part)
        examples.append(
            Example(
                id=stable_id(name, index),
                image=unpack(f"{at}.jpg", packed[at]),
                image_id=f"{name}/{at}",
                prompt=_asked(question, options) + ending,
                answer=row["answer"].strip(),
                kind=row.get("category") or "",
                choices=options,
                extra={"scoring": "multiple_choice"},
            )
        )
    return examples


def mmstar(folder: Path) -> list[Example]:
    """`mmstar.parquet`, `MMStar.tsv` or `*.jsonl`. arXiv 2403.20330.

    The authors' own table has the options inside the question; others have columns A to D.
    """
    table = find(folder, "*mmstar*.tsv", "*MMStar*.tsv", "*.jsonl", "*mmstar*.parquet", "*.parquet")
    unpack = PackedPictures(table)
    examples = []
    for row in read_table([table]):
        options = _columns(row)
        question = _asked(row["question"], options) if options else row["question"]
        examples.append(
            Example(
                id=stable_id("mmstar", row["index"]),
                image=unpack(f"{row['index']}.jpg", row["image"]),
                image_id=f"mmstar/{row['index']}",
                prompt=question + LETTER,
                answer=row["answer"].strip(),
                kind=row.get("category") or "",
                choices=options or _inside(row["question"]),
                extra={"scoring": "multiple_choice"},
            )
        )
    return examples


def mmmu(folder: Path) -> list[Example]:
    """`SUBJECT/validation-*.parquet` or `*.jsonl` with the same columns. arXiv 2311.16502.

    Questions about several pictures are left out and counted. Open questions are right if the answer agrees
    with an accepted one; the authors' own script looks for it anywhere in the answer.
    """
    tables = find_all(folder, "validation*.parquet", "*.jsonl")
    examples, left_out = [], 0
    for table in tables:
        unpack = PackedPictures(table)
        for row in read_table([table]):
            if row.get("image_1") is None or row.get("image_2") is not None:
                left_out += 1
                continue
            examples.append(_mmmu(row, unpack(f"{row['id']}.png", row["image_1"])))
    if left_out:
        logger.info("%s: %d questions about no or several pictures left out", folder, left_out)
    return examples


def _mmmu(row: dict[str, Any], picture: str) -> Example:
    options = tuple(str(option) for option in _literal(row["options"]) or ())
    question = re.sub(r"<image \d+>", "", row["question"]).strip()
    subject = re.sub(r"^(?:validation|dev|test)_|_\d+$", "", row["id"])
    common = {
        "id": stable_id("mmmu", row["id"]),
        "image": picture,
        "image_id": f"mmmu/{row['id']}",
        "kind": subject,
    }
    if row["question_type"] == "multiple-choice":
        scoring = {"scoring": "multiple_choice"}
        prompt = _asked(question, options) + LETTER
        return Example(**common, prompt=prompt, answer=row["answer"].strip(), choices=options, extra=scoring)
    answers = _literal(row["answer"])
    answers = [str(a) for a in answers] if isinstance(answers, list) else [str(row["answer"])]
    return Example(**common, prompt=question + OPEN, answer=answers[0], extra={"scoring": "one_of", "answers": answers})


def scienceqa(folder: Path) -> list[Example]:
    """`problems.json`, `pid_splits.json` and `test/ID/image.png`; text-only questions are left out. arXiv
    2209.09513."""
    problems, splits = (read_json(find(folder, name)) for name in ("problems.json", "pid_splits.json"))
    picture = PictureFolder(folder, ["test", "images/test", "images"])
    examples = []
    for number in splits["test"]:
        problem = problems[number]
        if not problem.get("image"):
            continue
        options = tuple(problem["choices"])
        question = "\n".join(part for part in (problem.get("hint"), problem["question"]) if part)
        examples.append(
            Example(
                id=stable_id("scienceqa", number),
                image=picture(f"{number}/{problem['image']}"),
                image_id=f"scienceqa/{number}",
                prompt=_asked(question, options) + LETTER,
                answer=list(letters(len(options)))[problem["answer"]],
                kind=problem.get("subject", ""),
                choices=options,
                extra={"scoring": "multiple_choice"},
            )
        )
    return examples


def _asked(question: str, options: tuple[str, ...]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(letters(26), options, strict=False))])


def _columns(row: dict[str, Any]) -> tuple[str, ...]:
    """Options from columns A, B, C, ... up to the first that is empty."""
    found: list[str] = []
    for letter in letters(26):
        if row.get(letter) is None:
            break
        found.append(str(row[letter]))
    return tuple(found)


def _inside(question: str) -> tuple[str, ...]:
    """Options written into a question as `Options: A: red, B: blue`."""
    _, _, listed = question.rpartition("Options:")
    parts = re.split(r"(?:^|,\s*|\s+)([A-Z]):\s*", listed)
    named = dict(zip(parts[1::2], parts[2::2], strict=False))
    found = []
    for letter in letters(26):
        if letter not in named:
            break
        found.append(named[letter].strip(" ,."))
    return tuple(found)


def _literal(text: Any) -> Any:
    """MMMU writes lists as Python text; anything else comes back as it is."""
    if not isinstance(text, str) or not text.startswith("["):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
