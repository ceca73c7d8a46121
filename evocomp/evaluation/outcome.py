"""Input of a report: an outcome per method, kept count and seed, and the questions that all of them answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REFERENCE = "references"
BEFORE_LLM = "select or merge before the LLM"
WITH_CONTEXT = "select before the LLM, with context tokens"
AFTER_LLM = "select before the LLM, after an extra LLM pass over all tokens"
INSIDE_LLM = "enter the LLM with all tokens; drop some between layers"
GROUPS = (REFERENCE, WITH_CONTEXT, BEFORE_LLM, AFTER_LLM, INSIDE_LLM)
"""Headings of the tables, in this order; a group that is not listed comes last."""


@dataclass(frozen=True)
class Outcome:
    """Answers of one method at one kept count with one seed; seeds are averaged question by question."""

    method: str
    kept: int
    """Number of visual tokens that enter the LLM (R); for image downsampling, the most that may."""
    correct: np.ndarray
    """Scores [n] between 0 (wrong) and 1 (correct)."""
    answers: Sequence[str] = ()
    """Answers [n]; empty if only their scores are known."""
    kept_average: float | None = None
    """Visual tokens averaged over the LLM's layers; None = `kept`."""
    needs_llm: bool = False
    """Whether the LLM has to process all visual tokens before the method can select."""
    group: str = ""
    """Heading in the tables; empty: `BEFORE_LLM`, or `AFTER_LLM` if `needs_llm`."""
    note: str = ""
    not_applicable: str | None = None
    """Why the method cannot run on this model; `correct` is ignored then."""


@dataclass(frozen=True)
class Questions:
    """The n questions that every outcome answers, in the same order."""

    images: Sequence[str]
    """Image id of each question [n]; questions about one image are resampled together."""
    kinds: Sequence[str]
    gold: Sequence[str]
    prompts: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Roles:
    """Names of the methods that the others are compared with."""

    ours: str = "evocomp"
    full: str = "full"
    floor: str = "no_image"
    downsampled: str = "downsampling"
