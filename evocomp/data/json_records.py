"""JSON and JSON Lines as people have them: with a byte-order mark, one record a line, under any file name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evocomp.log import UserError


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError with file and line."""
    return _parsed(_text(path), path)


def read_lines(path: Path) -> list[Any]:
    """The records of a JSON Lines file, one a line; empty lines are skipped. Raises UserError with file and line."""
    return _lines(_text(path), path)


def read_records(path: Path, is_record: Callable[[Any], bool]) -> list[Any]:
    """The records of a file that is a JSON list, or JSON Lines, whatever it is called.

    Args:
        is_record: tells a single record from other objects, for a JSON Lines file with one line.

    Raises:
        UserError: neither of the two, with file and line.
    """
    text = _text(path)
    # two objects one after another are JSON Lines; of a list that is broken its own mistake is told
    if path.suffix == ".jsonl" or (text.lstrip()[:1] == "{" and _is_json(text.lstrip().partition("\n")[0])):
        records = _lines(text, path)
        if len(records) > 1 or path.suffix == ".jsonl":
            return records[0] if len(records) == 1 and isinstance(records[0], list) else records
    content = _parsed(text, path)
    if isinstance(content, list):
        return content
    if is_record(content):
        return [content]
    raise UserError(f"{path}: must be a list of records, or one record a line, as LLaVA's files are")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _lines(text: str, path: Path) -> list[Any]:
    # not splitlines: JSON strings may hold U+2028 and the like
    return [_parsed(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parsed(text: str, path: Path, line: int = 0) -> Any:
    """`line`: of JSON Lines, the number of the line that `text` is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one record a line is expected" if line else ""
        raise UserError(f"{path}:{line or error.lineno}: not valid JSON ({error.msg}){hint}") from None
    except RecursionError:
        raise UserError(f"{path}: lists or objects lie too deeply within one another") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: not valid JSON ({error})") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
