"""Converts outcomes to rows: all numbers of the report with intervals and comparisons.

A row is a plain dict, one per method and number of kept tokens; `report.json` is the list of them. Shares: 0 to 1.

====================================  ======================================================================
method, kept, group, note, needs_llm  see `Outcome`; `kept` is the number of visual tokens that enter the LLM
accuracy, low, high, n                mean score over n questions with its interval (images resampled)
relative                              accuracy / accuracy of the uncompressed model
retention_above_chance                (accuracy - no image) / (uncompressed - no image)
loyalty                               share of questions with the same answer as the uncompressed model
hard, hard_n                          accuracy on the questions that need detail, and their number: correct with
                                      all tokens, wrong with image downsampling to the same number of tokens
difference_vs_evocomp, _low, _high    this method minus EvoComp at the same kept count, per question
p_vs_evocomp, mcnemar_vs_evocomp      two-sided p of this difference, paired over images (bootstrap; for few images
                                      the exact sign-flip test); exact p of McNemar's test
difference_vs_full, _low, _high       this method minus the uncompressed model; `p_vs_full` as above
by_kind                               accuracy by question type
kept_average                          visual tokens averaged over the layers of the LLM
seeds, seed_std                       number of averaged seeds, and the standard deviation of their accuracies
not_applicable                        reason why there are no numbers (then all of them are None), else None
====================================  ======================================================================
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evocomp.evaluation.outcome import AFTER_LLM, BEFORE_LLM, Outcome, Questions, Roles
from evocomp.evaluation.statistics import (
    ImageBootstrap,
    compression_hard,
    loyalty,
    mcnemar,
    retention_above_chance,
    spread,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A method at one number of kept tokens, with all its seeds."""

    first: Outcome
    scores: np.ndarray
    """[seeds, n]"""
    answers: list[Sequence[str]]
    """Answers [n] of each seed, if known."""

    @property
    def mean(self) -> np.ndarray:
        return self.scores.mean(axis=0)


Runs = dict[tuple[str, int], Run]


def summarise(
    outcomes: Sequence[Outcome],
    questions: Questions,
    roles: Roles = Roles(),  # noqa: B008 (frozen)
    resamples: int = 2000,
    seed: int = 0,
) -> list[Row]:
    """One row per method and number of kept tokens, in the order of the outcomes.

    Raises:
        ValueError: the uncompressed model is missing, or an outcome does not have one score per question.
    """
    runs = join_seeds(outcomes, questions)
    if only(runs, roles.full) is None:
        raise ValueError(f"there is no outcome of {roles.full!r}, to which accuracies are relative")
    bootstrap = ImageBootstrap(questions.images, resamples, seed)
    scored = [key for key, run in runs.items() if run.first.not_applicable is None]
    drawn = bootstrap.means(np.stack([runs[key].mean for key in scored], axis=1))
    panel = _Panel(runs, dict(zip(scored, drawn.T, strict=True)), bootstrap, questions, roles)
    return [panel.row(key) if key in panel.drawn else _empty_row(run.first) for key, run in runs.items()]


def join_seeds(outcomes: Sequence[Outcome], questions: Questions) -> Runs:
    """Group outcomes by (method, kept); several with the same key are seeds."""
    together: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        together.setdefault((outcome.method, outcome.kept), []).append(outcome)
    n = len(questions)
    runs = {}
    for key, seeds in together.items():
        if seeds[0].not_applicable is not None:
            runs[key] = Run(seeds[0], np.empty((0, n)), [])
            continue
        if any(np.shape(seed.correct) != (n,) or len(seed.answers) not in (0, n) for seed in seeds):
            raise ValueError(f"{key[0]} at {key[1]} kept: expected one score and one answer per question")
        scores = np.stack([np.asarray(outcome.correct, dtype=np.float64) for outcome in seeds])
        runs[key] = Run(seeds[0], scores, [outcome.answers for outcome in seeds if len(outcome.answers)])
    return runs


def only(runs: Runs, method: str) -> Run | None:
    """The run of a method with a single number of kept tokens; if there are several, the one with most tokens."""
    found = [run for (name, _), run in runs.items() if name == method and len(run.scores)]
    return max(found, key=lambda run: run.first.kept, default=None)


@dataclass(frozen=True)
class _Panel:
    """All runs with their resampled means [resamples]."""

    runs: Runs
    drawn: dict[tuple[str, int], np.ndarray]
    bootstrap: ImageBootstrap
    questions: Questions
    roles: Roles

    def row(self, key: tuple[str, int]) -> Row:
        run, full, floor = self.runs[key], only(self.runs, self.roles.full), only(self.runs, self.roles.floor)
        interval = self.bootstrap.interval_of(run.mean.mean(), self.drawn[key])
        seeds = spread(run.scores.mean(axis=1))
        whole = float(full.mean.mean())
        row = _empty_row(run.first) | {
            "accuracy": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "n": len(self.questions),
            "relative": interval.mean / whole if whole > 0 else None,
            "by_kind": _by_kind(run.mean, self.questions.kinds),
            "kept_average": float(run.first.kept if run.first.kept_average is None else run.first.kept_average),
            "seeds": seeds.seeds,
            "seed_std": seeds.std,
        }
        if floor is not None:
            row["retention_above_chance"] = retention_above_chance(interval.mean, floor.mean.mean(), whole)
        if full.answers and run.answers:
            row["loyalty"] = float(np.mean([loyalty(answers, full.answers[0]) for answers in run.answers]))
        row |= self._hard(run, full, self.runs.get((self.roles.downsampled, key[1])))
        if run is not full:
            row |= self._difference("full", key, (self.roles.full, full.first.kept))
        ours = (self.roles.ours, key[1])
        if ours in self.drawn and ours != key:
            row |= self._difference("evocomp", key, ours) | self._mcnemar(run, self.runs[ours])
        return row

    def _difference(self, other: str, key: tuple[str, int], other_key: tuple[str, int]) -> Row:
        gap = self.runs[key].mean - self.runs[other_key].mean
        found = self.bootstrap.difference_of(gap, self.drawn[key] - self.drawn[other_key])
        name = f"difference_vs_{other}"
        return {
            name: found.mean,
            f"{name}_low": found.low,
            f"{name}_high": found.high,
            f"p_vs_{other}": found.p,
        }

    @staticmethod
    def _mcnemar(run: Run, ours: Run) -> Row:
        """McNemar's test, which needs scores of 0 and 1: None for averages over seeds and for fractional scores."""
        binary = np.isin(np.concatenate([run.mean, ours.mean]), (0.0, 1.0)).all()
        return {"mcnemar_vs_evocomp": mcnemar(run.mean, ours.mean) if binary else None}

    @staticmethod
    def _hard(run: Run, full: Run, downsampled: Run | None) -> Row:
        if downsampled is None or not len(downsampled.scores):
            return {}
        hard = compression_hard(full.mean, downsampled.mean)
        return {"hard": float(run.mean[hard].mean()) if hard.any() else None, "hard_n": int(hard.sum())}


def _by_kind(scores: np.ndarray, kinds: Sequence[str]) -> dict[str, float]:
    kinds = np.asarray(kinds, dtype=str)
    return {str(kind): float(scores[kinds == kind].mean()) for kind in np.unique(kinds)}


def _empty_row(outcome: Outcome) -> Row:
    numbers = (
        "accuracy low high n relative retention_above_chance loyalty hard hard_n difference_vs_evocomp "
        "difference_vs_evocomp_low difference_vs_evocomp_high p_vs_evocomp mcnemar_vs_evocomp "
        "difference_vs_full difference_vs_full_low difference_vs_full_high p_vs_full kept_average seeds "
        "seed_std"
    )
    return {
        "method": outcome.method,
        "kept": outcome.kept,
        **dict.fromkeys(numbers.split()),
        "by_kind": {},
        "needs_llm": outcome.needs_llm,
        "group": outcome.group or (AFTER_LLM if outcome.needs_llm else BEFORE_LLM),
        "note": outcome.note,
        "not_applicable": outcome.not_applicable,
    }
