"""The unit of work: one question about one picture, with the answer that the MLLM should give."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def stable_id(*parts: Any) -> int:
    """A 63-bit integer that depends on nothing but `parts`; the same in every process and version.

    >>> stable_id("train", 3) == stable_id("train", 3)
    True
    """
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Example:
    """One question about one picture.

    Attributes:
        id: stable 63-bit integer; labels, priorities and random streams are keyed by it.
        image: path of the picture, or its pixels [height, width, 3] uint8.
        image_id: examples with the same value ask about the same picture.
        prompt: the question of this turn.
        answer: the gold answer of this turn.
        kind: the question's type; accuracies are reported by it.
        history: earlier (question, answer) turns of the conversation.
        choices: the answers a multiple-choice question offers, else empty.
        extra: what a task needs besides (other accepted answers, target object, ...).
    """

    id: int
    image: str | np.ndarray
    image_id: str
    prompt: str
    answer: str
    kind: str = ""
    history: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
