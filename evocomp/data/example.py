"""A training or test example: one question about one or several images, with the answer that the MLLM should give."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def stable_id(*parts: Any) -> int:
    """A 63-bit integer that depends on `parts` only; the same in every process and version.

    >>> stable_id("train", 3) == stable_id("train", 3)
    True
    """
    text = "\x1f".join(str(part) for part in parts).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Example:
    """One question about one or several images.

    Attributes:
        id: stable 63-bit integer; labels, priorities and random streams are keyed by it.
        image: the image, or the first of several: a path, a `data:` URI, or pixels [height, width, 3] uint8.
        image_id: examples with the same value ask about the same image, or the same images in the same order.
        prompt: the question of this turn.
        answer: the gold answer of this turn.
        kind: the question's type; accuracies are reported by it.
        history: earlier (question, answer) turns of the conversation.
        choices: the answers a multiple-choice question offers, else empty.
        extra: additional data of a task (other accepted answers, target object, name of the record, ...).
        further_images: the images after the first.
        image_ids: name of each image if there are several; empty for a single image, whose name is `image_id`.
        placed: for each image, the turn (0 = the first question) and the character of that turn's question before
            which the image is inserted; empty: all images before the first question.
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
    further_images: tuple[str | np.ndarray, ...] = ()
    image_ids: tuple[str, ...] = ()
    placed: tuple[tuple[int, int], ...] = ()

    @property
    def images(self) -> tuple[str | np.ndarray, ...]:
        """All images, in the order of the conversation."""
        return (self.image, *self.further_images)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each image."""
        return self.image_ids or (self.image_id,)

    @property
    def record(self) -> str:
        """Name of the example in messages: its record in the user's file if known, else its id."""
        return str(self.extra.get("record", f"example {self.id}"))


def image_groups(examples: Iterable[Example]) -> dict[str, str]:
    """Name of each image -> name of its group: images of the same question are in the same group.

    Questions about different groups have no image in common. An image without a partner forms a group of its name.

    >>> pair = Example(1, "a.png", "a + b", "?", "yes", further_images=("b.png",), image_ids=("a", "b"))
    >>> image_groups([pair, Example(2, "b.png", "b", "?", "no"), Example(3, "c.png", "c", "?", "no")])
    {'a': 'a', 'b': 'a', 'c': 'c'}
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for example in examples:
        first = root(example.names[0])
        for other in example.names[1:]:
            first, second = sorted((first, root(other)))
            parent[second] = first
    return {name: root(name) for name in parent}
