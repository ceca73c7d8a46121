"""The turns of one record: role, text without image placeholders, and positions of the images.

Supported: LLaVA's `{"from": "human", "value": "<image>\\nWhat is it?"}` and the chat format of OpenAI and Hugging Face,
`{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ...}}, {"type": "text", "text": ...}]}`.
Ambiguous input raises `Fault`; nothing is guessed.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM}
_ROLES |= {"chatgpt": ASSISTANT, "model": ASSISTANT}

MARK = re.compile(r"<im_start>\s*<image>\s*<im_end>|<image(?:-placeholder)?>", re.IGNORECASE)
"""Image placeholders in a text: LLaVA's token, optionally between its start and end tokens, and its placeholder."""

_CONTROL = re.compile(
    r"<im_(?:start|end|patch)>|<\|\w+\|>|<image(?:_token|_placeholder|_soft_token|here|[ _-]?\d+)>", re.IGNORECASE
)
"""Tokens of other chat formats and models, which a tokenizer may read as control or image tokens."""

_OTHER_MEDIA = re.compile(r"<(video|audio)(?:-placeholder)?>", re.IGNORECASE)
_IMAGE_TYPES = ("image", "image_url", "input_image")
_TEXT_TYPES = ("text", "input_text", "output_text")


class Fault(ValueError):
    """A fault of a record. The message follows the name of the record."""


@dataclass(frozen=True)
class Mark:
    """An image in a turn, with its source if the turn names one."""

    source: Any = None


@dataclass
class Turn:
    """One turn.

    Attributes:
        text: text without image placeholders, stripped; may be empty.
        marks: for each image, the character of `text` before which it is inserted, and its `Mark`.
        number: index of the turn in the record, from 1.
        is_null: whether the content is null or missing.
    """

    role: str
    text: str
    number: int = 0
    marks: list[tuple[int, Mark]] = field(default_factory=list)
    is_null: bool = False


def read_turns(turns: list[dict[str, Any]]) -> list[Turn]:
    """Alternating questions and answers. System turns are skipped, because the model's chat template sets its own.

    Raises:
        Fault: an unknown role, content that is not text, two turns of the same role in a row, an image or a token of
            another chat format in an answer, ...
    """
    found = [turn for turn in (_turn(number, raw) for number, raw in enumerate(turns, 1)) if turn.role != SYSTEM]
    for before, after in zip(found, found[1:], strict=False):
        if before.role == after.role:
            what = "answers" if after.role == ASSISTANT else "questions"
            raise Fault(f"has two {what} in a row (turns {before.number} and {after.number}); join them")
    return found


def speaks_of_image(turns: list[dict[str, Any]]) -> bool:
    """Whether a question refers to an image, video or audio, in any of the supported forms."""
    return any(_has_media(turn.get("value", turn.get("content"))) for turn in turns if _role(turn) == USER)


def _has_media(content: Any) -> bool:
    if isinstance(content, str):
        return bool(MARK.search(content) or _OTHER_MEDIA.search(content))
    parts = content if isinstance(content, list) else [content]
    kinds = [part.get("type", "") for part in parts if isinstance(part, dict)]
    media = ("image", "input_image", "video", "input_video", "audio", "input_audio")
    return any(str(kind).startswith(media) for kind in kinds) or any(
        _has_media(part) for part in parts if isinstance(part, str)
    )


def _role(turn: dict[str, Any]) -> str | None:
    speaker = turn.get("from") if turn.get("from") is not None else turn.get("role")
    return _ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None


def _turn(number: int, raw: dict[str, Any]) -> Turn:
    role = _role(raw)
    if role is None:
        speaker = raw.get("from", raw.get("role"))
        raise Fault(f"turn {number} has the role {_short(speaker)}; use human (user), gpt (assistant) or system")
    content = raw["value"] if "value" in raw else raw.get("content")
    if role == SYSTEM:
        return Turn(role, "", number)
    pieces = list(_pieces(content, number))
    text, marks = "", []
    for piece in pieces:
        if isinstance(piece, Mark):
            marks.append((len(text), piece))
        else:
            text += piece
    _check(text, role, marks, number)
    stripped = text.strip()
    start = len(text) - len(text.lstrip())
    marks = [(min(max(0, at - start), len(stripped)), mark) for at, mark in marks]
    return Turn(role, stripped, number, marks, is_null=content is None)


def _pieces(content: Any, number: int) -> Iterator[str | Mark]:
    """Texts and image marks of a turn's content, in order."""
    if content is None:
        return
    if isinstance(content, str):
        yield from _split(content)
    elif isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content):
        yield str(content)  # an answer such as 3, written without quotation marks
    elif isinstance(content, list | dict):
        yield from _parts(content if isinstance(content, list) else [content], number)
    else:
        raise Fault(f"the text of turn {number} is {_short(content)}, not text")


def _parts(parts: list[Any], number: int) -> Iterator[str | Mark]:
    """Parts of a list as in OpenAI's format; adjacent texts are separated by a line break."""
    follows_text = False
    for part in parts:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else "text"
        if kind in _IMAGE_TYPES:
            yield Mark(_source_of(part, number))
            follows_text = False
            continue
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in _TEXT_TYPES or not isinstance(text, str):
            what = f"a part of type {_short(kind)}" if isinstance(part, dict) else f"{_short(part)} in its list"
            raise Fault(f"turn {number} has {what}; use texts and images only")
        if follows_text:
            yield "\n"
        yield from _split(text)
        follows_text = True


def _source_of(part: dict[str, Any], number: int) -> Any:
    for key in ("image", "image_url", "url", "path"):
        source = part.get(key)
        if isinstance(source, dict):
            source = source.get("url") or source.get("path")
        if source:
            return source
    if any(part.get(key) for key in ("file_id", "bytes", "data", "source")):
        raise Fault(f"turn {number} has an image that is neither a file nor a data: URI; give one of these")
    return None


def _split(text: str) -> Iterator[str | Mark]:
    start = 0
    for found in MARK.finditer(text):
        yield text[start : found.start()]
        yield Mark()
        start = found.end()
    yield text[start:]


def _check(text: str, role: str, marks: list[Any], number: int) -> None:
    what = "question" if role == USER else "answer"
    if marks and role == ASSISTANT:
        raise Fault(f"turn {number} has an image placeholder in an answer")
    token = _CONTROL.search(text)
    if token:
        raise Fault(f"the {what} of turn {number} holds the token {token[0]} of a chat format or model; remove it")
    other = _OTHER_MEDIA.search(text) if role == USER else None
    if other:
        raise Fault(f"turn {number} has a placeholder for {other[1].lower()}, which is not supported")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Fault(f"the {what} of turn {number} holds an unpaired surrogate, not a valid character") from None


def _short(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
