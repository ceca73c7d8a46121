"""What the panel hands in: an outcome per method, budget and seed, and the questions that all answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REFERENCE = "reference and floors"
BEFORE_LLM = "needs nothing from the LLM"
WITH_CONTEXT = "others with our context tokens"
AFTER_LLM = "ran the LLM on all tokens first"


@dataclass(frozen=True)
class Outcome:
    """What one method did at one budget; handed in once per seed, seeds are averaged question by question."""

    method: str
    kept: int
    """Visual tokens at the LLM's door (R); for image downsampling the budget that it had to fit in."""
    correct: np.ndarray
    """Right or wrong [n], or scores between 0 and 1."""
    answers: Sequence[str] = ()
    """What was answered [n]; empty if answers were only scored."""
    kept_average: float | None = None
    """Visual tokens averaged over the LLM's layers; None = `kept`."""
    needs_llm: bool = False
    """Whether the LLM ran on all tokens before the method could choose."""
    group: str = ""
    """Heading of the table that it stands under; empty = by `needs_llm`."""
    note: str = ""
    not_applicable: str | None = None
    """Why the method cannot run on this model; `correct` is then ignored."""


@dataclass(frozen=True)
class Questions:
    """The n questions that every outcome answers, in the same order."""

    images: Sequence[str]
    """Which picture each asks about [n]; questions of a picture are resampled together."""
    kinds: Sequence[str]
    gold: Sequence[str]
    prompts: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Roles:
    """Which method plays which part in the comparisons."""

    ours: str = "evocomp"
    full: str = "full"
    floor: str = "no_image"
    downsampled: str = "downsampling"
