"""Read JSON and JSON Lines, with or without a byte-order mark, under any file name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evocomp.log import UserError


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError with file and line."""
    return _parsed(_text(path), path)


def read_lines(path: Path) -> list[Any]:
    """The records of a JSON Lines file, one per line; empty lines are skipped. Raises UserError with file and line."""
    return _lines(_text(path), path)


def read_records(path: Path, is_record: Callable[[Any], bool]) -> list[Any]:
    """The records of a JSON list or of a JSON Lines file, independent of the file name.

    Args:
        is_record: whether an object is a single record, for a JSON Lines file with one line.

    Raises:
        UserError: the file has neither format; the message names file and line.
    """
    text = _text(path)
    # an object on the first line suggests JSON Lines; for a broken list, the error of the list is reported
    if path.suffix == ".jsonl" or (text.lstrip()[:1] == "{" and _is_json(text.lstrip().partition("\n")[0])):
        records = _lines(text, path)
        if len(records) > 1 or path.suffix == ".jsonl":
            return records[0] if len(records) == 1 and isinstance(records[0], list) else records
    content = _parsed(text, path)
    if isinstance(content, list):
        return content
    if is_record(content):
        return [content]
    raise UserError(f"{path}: must be a list of records, or one record per line, as in LLaVA's format")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _lines(text: str, path: Path) -> list[Any]:
    # not splitlines, because JSON strings may contain U+2028 and similar characters
    return [_parsed(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parsed(text: str, path: Path, line: int = 0) -> Any:
    """Parse JSON; `line`: line number of `text` in a JSON Lines file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; expected one record per line" if line else ""
        raise UserError(f"{path}:{line or error.lineno}: not valid JSON ({error.msg}){hint}") from None
    except RecursionError:
        raise UserError(f"{path}: lists or objects are nested too deeply") from None
    except ValueError as error:  # for example a number with thousands of digits
        raise UserError(f"{path}: not valid JSON ({error})") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
