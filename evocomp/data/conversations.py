"""LLaVA's conversation format: a list of records (JSON, or JSON Lines) and a folder of images.

    [{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\ncolor of circle"},
                                                     {"from": "gpt", "value": "red"}, ...]}, ...]

Each answered turn becomes one `Example` with the earlier turns as its history. Images are not opened here: a file that
cannot be decoded is reported when the model reads it, see `evocomp.mllm.reader`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from evocomp.data.example import Example, stable_id
from evocomp.data.image_files import ImageFolder, named_images
from evocomp.data.json_records import read_records
from evocomp.data.scenes import SceneSpec, scene_examples
from evocomp.data.turns import ASSISTANT, USER, Fault, Mark, Turn, read_turns, speaks_of_image
from evocomp.files import whole_file, write_whole
from evocomp.log import UserError, logger, one_line, printable

_TURNS = ("conversations", "messages")


@dataclass
class Reading:
    """Result of reading a file.

    Attributes:
        examples: the questions.
        text_only: number of records without an image, which are skipped.
        bad: "record NAME: what is wrong" for each faulty record, which is skipped.
        left_out: reason -> names of the records from which turns were skipped for it.
    """

    examples: list[Example] = field(default_factory=list)
    text_only: int = 0
    bad: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def read_conversations(source: str | Path, image_folder: str | Path | None = None, max_bad: int = 10) -> Reading:
    """Read a file in LLaVA's format, or a folder that holds `data.json` or `data.jsonl`.

    Text-only records are counted and skipped. A faulty record (a missing image, a video, two answers in a row, a number
    of image placeholders that differs from the number of images, ...) is reported with its id and skipped, up to
    `max_bad` of them.

    Raises:
        UserError: no such file, invalid JSON (with file and line), a record without conversations, too many faulty
            records, no usable question.
    """
    path = _file(Path(source), source)
    records = read_records(path, lambda content: isinstance(content, dict) and _turns_of(content) is not None)
    folder = Path(image_folder) if image_folder else path.parent
    if not folder.is_dir():
        raise UserError(f"data.image_folder={folder}: no such folder")
    reading, images = Reading(), ImageFolder(folder)
    seen: set[int] = set()
    for number, record in enumerate(records):
        _check_form(path, number, record)
        try:
            examples = _examples(record, _name(record, number), images, reading.left_out)
        except Fault as fault:
            _leave_out(reading, f"{_name(record, number)}: {fault}", path, max_bad)
            continue
        reading.text_only += examples is None
        for example in examples or ():
            if example.id not in seen:  # a duplicate record is labelled once
                seen.add(example.id)
                reading.examples.append(example)
    _log_skipped(path, reading)
    if not reading.examples:
        raise UserError(f"{path}: no usable question about an image in {len(records)} records{_reasons(reading)}")
    return reading


def write_scenes(out: Path, seed: int, count: int, relation: bool = False, spec: SceneSpec = SceneSpec()) -> int:
    """Write `count` scenes as a LLaVA-format folder; returns the number of records (one per question).

    Raises:
        UserError: `out` already holds a dataset.
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
            with whole_file(out / name) as file:
                Image.fromarray(example.image).save(file, "PNG")
            written.add(name)
        turns = [
            {"from": "human", "value": f"<image>\n{example.prompt}"},
            {"from": "gpt", "value": example.answer},
        ]
        records.append({"id": str(example.id), "image": name, "kind": example.kind, "conversations": turns})
    write_whole(out / "data.json", (json.dumps(records, indent=0) + "\n").encode())
    return len(records)


def _file(path: Path, source: str | Path) -> Path:
    """The data file of a source, which may be a folder."""
    if path.is_dir():
        found = [path / name for name in ("data.json", "data.jsonl") if (path / name).is_file()]
        path = found[0] if found else path / "data.json"
    if not path.is_file():
        raise UserError(f"data.source={source}: no such file or folder (a folder must hold data.json or data.jsonl)")
    return path


def _turns_of(record: dict[str, Any]) -> Any:
    return next((record[key] for key in _TURNS if record.get(key) is not None), None)


def _name(record: dict[str, Any], number: int) -> str:
    """Name of a record in messages: its id, or its index if it has none."""
    name = record.get("id")
    text = str(number if name is None or name == "" else name)
    return f"record {printable(' '.join(text.split())[:80])[:90]}"


def _check_form(path: Path, number: int, record: Any) -> None:
    """Raise UserError unless this is a record with turns: otherwise the file has another format."""
    if not isinstance(record, dict) or not isinstance(_turns_of(record), list):
        raise UserError(f"{path}: record {number} has no list `conversations` (or `messages`)")
    if not all(isinstance(turn, dict) for turn in _turns_of(record)):
        raise UserError(f"{path}: record {number} has a turn that is not {{from, value}}")


def _leave_out(reading: Reading, fault: str, path: Path, max_bad: int) -> None:
    fault = one_line(fault)
    reading.bad.append(fault)
    logger.warning("left out %s", fault)
    if len(reading.bad) > max_bad:
        raise UserError(
            f"{path}: more than data.max_bad={max_bad} records have a missing image or another fault "
            f"(last: {fault}); correct the data or raise data.max_bad"
        )


def _log_skipped(path: Path, reading: Reading) -> None:
    if reading.text_only:
        logger.info("%s: %d text-only records left out", path, reading.text_only)
    for reason, names in reading.left_out.items():
        logger.info("%s: %d turns left out (%s), first in %s", path, len(names), reason, names[0])


def _reasons(reading: Reading) -> str:
    """Reasons for which there is no question."""
    reasons = [f"{reading.text_only} text-only"] if reading.text_only else []
    reasons += [f"left out {fault}" for fault in reading.bad[:1]]
    reasons += [f"{len(names)} turns left out ({reason})" for reason, names in reading.left_out.items()]
    return f" ({'; '.join(reasons)})" if reasons else ""


# ------------------------------------------------------------ one record


def _examples(
    record: dict[str, Any], name: str, images: ImageFolder, left_out: dict[str, list[str]]
) -> list[Example] | None:
    """The questions of a record; None if it has no image. Raises Fault."""
    sources = named_images(record)
    if not sources and not speaks_of_image(_turns_of(record)):
        return None
    turns = read_turns(_turns_of(record))
    if len(turns) < len(_turns_of(record)):
        left_out.setdefault("a system turn", []).append(name)
    if turns and turns[0].role == ASSISTANT:  # LLaVA's own code skips it too
        left_out.setdefault("an answer before the first question", []).append(name)
        turns = turns[1:]
    questions = [turn for turn in turns if turn.role == USER]
    marks = [(turn, at, mark) for turn, question in enumerate(questions) for at, mark in question.marks]
    sources = _sources(sources, [mark for _, _, mark in marks])
    found = [images.find(source) for source in sources]
    places = [(turn, at) for turn, at, _ in marks] or [(0, 0)] * len(found)
    return list(_answered(record, name, turns, found, places, left_out))


def _sources(named: list[Any], marks: list[Mark]) -> list[Any]:
    """Sources of a record's images, one per placeholder. Raises Fault if sources and placeholders do not match."""
    own = [mark.source for mark in marks if mark.source is not None]
    if own and len(own) < len(marks):
        raise Fault("has image placeholders of which only some name a file")
    if own and named and own != named:
        raise Fault("names different images in its turns and in `image`")
    sources = own or named
    if not sources:
        raise Fault("has an image placeholder (<image>) but names no image")
    if marks and len(marks) != len(sources):
        raise Fault(f"has {_count(len(marks), 'image placeholder')} (<image>) for {_count(len(sources), 'image')}")
    return sources


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _answered(
    record: dict[str, Any],
    name: str,
    turns: list[Turn],
    found: list[tuple[str, str]],
    places: list[tuple[int, int]],
    left_out: dict[str, list[str]],
) -> Iterator[Example]:
    """Each answered question that comes after an image.

    Args:
        found: path and name of each image.
        places: for each image, the index of its question and the character before which it is inserted.
    """
    history: list[tuple[str, str]] = []
    for question, answer in zip(turns[::2], turns[1::2], strict=False):
        turn = len(history)
        seen = [number for number, (first, _) in enumerate(places) if first <= turn]
        if not seen:
            left_out.setdefault("before the first image", []).append(name)
        elif question.is_null:
            left_out.setdefault("the question is null", []).append(name)
        elif not answer.text:
            left_out.setdefault("no answer", []).append(name)
        else:
            paths, names = zip(*(found[number] for number in seen), strict=True)
            # a single image is placed before its question, wherever the placeholder is, as in LLaVA's own code
            placed = tuple(places[number] if len(found) > 1 else (places[number][0], 0) for number in seen)
            image_id = " + ".join(names)
            yield Example(
                # with the text, because several records of LLaVA's mixture have the id of the same COCO image
                id=stable_id("conversation", record.get("id", ""), image_id, turn, question.text, answer.text),
                image=paths[0],
                image_id=image_id,
                prompt=question.text,
                answer=answer.text,
                kind=printable(str(record.get("kind") or "")),
                history=tuple(history),
                extra={"record": name},
                further_images=paths[1:],
                image_ids=names if len(names) > 1 else (),
                placed=placed if any(where != (0, 0) for where in placed) else (),
            )
        history.append((question.text, answer.text))
    if len(turns) % 2 or not turns:
        left_out.setdefault("no answer", []).append(name)
