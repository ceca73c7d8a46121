"""LLaVA's conversation format: a JSON list of records and a folder of pictures.

    [{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\ncolor of circle"},
                                                     {"from": "gpt", "value": "red"}, ...]}, ...]

Each answered turn becomes one `Example` with the earlier turns as its history.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from evocomp.data.example import Example, stable_id
from evocomp.data.scenes import SceneSpec, scene_examples
from evocomp.log import UserError, logger

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass
class Reading:
    """What came of a file: the examples, and how many records were left out and why."""

    examples: list[Example] = field(default_factory=list)
    text_only: int = 0
    bad: list[str] = field(default_factory=list)


def read_conversations(source: str | Path, image_folder: str | Path | None = None, max_bad: int = 10) -> Reading:
    """Read a LLaVA-format JSON file, or a folder that holds `data.json`.

    Text-only records are counted and left out. A missing or broken picture is reported with its record's id and
    left out, until there are more than `max_bad` of them.

    Raises:
        UserError: no such file, broken JSON (with file and line), a record without conversations, too many bad
            pictures, nothing left.
    """
    path = Path(source)
    path = path / "data.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"data.source={source}: no such file or folder (a folder must hold data.json)")
    records = _parse(path)
    folder = Path(image_folder) if image_folder else path.parent
    if not folder.is_dir():
        raise UserError(f"data.image_folder={folder}: no such folder")
    reading = Reading()
    checked: dict[Path, str | None] = {}
    seen: set[int] = set()
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise UserError(f"{path}: record {number} has no list `conversations`")
        if not all(isinstance(turn, dict) for turn in record["conversations"]):
            raise UserError(f"{path}: record {number} has a turn that is not {{from, value}}")
        name = record.get("image")
        if not name:
            reading.text_only += 1
            continue
        picture = folder / str(name)
        if picture not in checked:
            checked[picture] = _fault(picture)
        if checked[picture]:
            reading.bad.append(f"record {record.get('id', number)}: {checked[picture]}")
            logger.warning("left out %s", reading.bad[-1])
            if len(reading.bad) > max_bad:
                raise UserError(
                    f"{path}: more than data.max_bad={max_bad} records have a missing or broken picture "
                    f"(last: {reading.bad[-1]}); mend the data or raise data.max_bad"
                )
            continue
        for example in _turns(record, picture, str(name)):
            if example.id not in seen:  # a record that stands there twice is labelled once
                seen.add(example.id)
                reading.examples.append(example)
    if reading.text_only:
        logger.info("%s: %d text-only records left out", path, reading.text_only)
    if not reading.examples:
        raise UserError(f"{path}: no usable question about a picture in {len(records)} records")
    return reading


def write_scenes(
    out: Path, seed: int, count: int, relation: bool = False, spec: SceneSpec = SceneSpec()
) -> int:
    """Write `count` scenes as a LLaVA-format folder; returns the number of records (one a question).

    Raises:
        UserError: `out` already holds a data set.
    """
    if (out / "data.json").exists():
        raise UserError(f"--out={out} already holds data.json; choose another folder")
    if out.is_file():
        raise UserError(f"--out={out} is a file; give a folder")
    (out / "images").mkdir(parents=True, exist_ok=True)
    records, written = [], set()
    for example in scene_examples(seed, 0, count, spec, relation):
        name = f"images/{example.image_id}.png"
        if name not in written:
            Image.fromarray(example.image).save(out / name)
            written.add(name)
        turns = [
            {"from": "human", "value": f"<image>\n{example.prompt}"},
            {"from": "gpt", "value": example.answer},
        ]
        records.append({"id": str(example.id), "image": name, "kind": example.kind, "conversations": turns})
    temporary = out / "data.json.tmp"
    temporary.write_text(json.dumps(records, indent=0) + "\n")
    temporary.replace(out / "data.json")
    return len(records)


def _parse(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not isinstance(records, list):
        raise UserError(f"{path}: must be a list of records, as LLaVA's files are")
    return records


def _fault(picture: Path) -> str | None:
    if not picture.is_file():
        return f"picture {picture} is missing"
    try:
        with Image.open(picture) as image:
            image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"picture {picture} does not decode ({error})"
    return None


def _turns(record: dict, picture: Path, image_id: str) -> Iterator[Example]:
    history: list[tuple[str, str]] = []
    question = None
    for turn in record["conversations"]:
        role = _ROLES.get(turn.get("from") or turn.get("role"))
        text = str(turn.get("value", turn.get("content", ""))).replace("<image>", "").strip()
        if role == "user":
            question = text
        elif role == "assistant" and question is not None:
            if text:
                yield Example(
                    # with the words: LLaVA's mixture names several records after one COCO picture
                    id=stable_id("conversation", record.get("id", ""), image_id, len(history), question, text),
                    image=str(picture),
                    image_id=image_id,
                    prompt=question,
                    answer=text,
                    kind=str(record.get("kind", "")),
                    history=tuple(history),
                )
            history.append((question, text))
            question = None
