"""Input of a report: one outcome per method, number of kept tokens and seed, and the questions that they answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REFERENCE = "references"
BEFORE_LLM = "select or merge before the LLM"
WITH_CONTEXT = "select before the LLM, with context tokens"
AFTER_LLM = "select before the LLM, after an extra LLM pass over all tokens"
INSIDE_LLM = "enter the LLM with all tokens; drop some between layers"
GROUPS = (REFERENCE, WITH_CONTEXT, BEFORE_LLM, AFTER_LLM, INSIDE_LLM)
"""Headings of the groups in the tables, in this order; groups that are not listed come last."""


@dataclass(frozen=True)
class Outcome:
    """Answers of one method at one number of kept tokens with one seed; seeds are averaged for each question."""

    method: str
    kept: int
    """Number of visual tokens that enter the LLM (R); an upper limit for image downsampling."""
    correct: np.ndarray
    """Scores [n] between 0 (wrong) and 1 (correct)."""
    answers: Sequence[str] = ()
    """Answers [n]; empty if only the scores are known."""
    kept_average: float | None = None
    """Number of visual tokens averaged over the layers of the LLM; None = `kept`."""
    needs_llm: bool = False
    """Whether the LLM has to process all visual tokens before the method can select."""
    group: str = ""
    """Heading of its group in the tables; empty: `BEFORE_LLM`, or `AFTER_LLM` if `needs_llm`."""
    note: str = ""
    not_applicable: str | None = None
    """Reason why the method cannot run on this model, else None; if given, `correct` is ignored."""


@dataclass(frozen=True)
class Questions:
    """The n questions that all outcomes answer, in the same order."""

    images: Sequence[str]
    """Image ids [n]; questions about the same image are resampled together."""
    kinds: Sequence[str]
    gold: Sequence[str]
    prompts: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Roles:
    """Names of the methods with a special role in the report."""

    ours: str = "evocomp"
    full: str = "full"
    floor: str = "no_image"
    downsampled: str = "downsampling"
