"""The contents of a report; `evocomp.evaluation.page` writes it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from evocomp.evaluation.outcome import Outcome, Questions, Roles
from evocomp.evaluation.rows import Row, join_seeds, only, summarise
from evocomp.evaluation.statistics import compression_hard


@dataclass(frozen=True)
class Case:
    """One question for which compression changed whether the answer is correct, shown as an example."""

    image: str
    kind: str
    prompt: str
    gold: str
    full: str
    ours: str
    downsampled: str
    lost: bool
    """True: correct when uncompressed, wrong with ours. False: wrong with downsampling, correct with ours."""


@dataclass(frozen=True)
class Report:
    """Everything that the report files show.

    Attributes:
        pictures: number of images.
        budgets: numbers of kept tokens, the columns of the tables.
        detail: the number of kept tokens in tables that show only one.
        subject: what was evaluated (run, model, recipe), for the head of the page.
        remarks: shown after the notes on methods.
    """

    rows: list[Row]
    questions: int
    pictures: int
    resamples: int
    budgets: tuple[int, ...]
    detail: int
    kind_counts: dict[str, int]
    cases: list[Case] = field(default_factory=list)
    roles: Roles = Roles()
    title: str = "Accuracy with fewer visual tokens"
    subject: str = ""
    remarks: Sequence[str] = ()


def make_report(
    outcomes: Sequence[Outcome],
    questions: Questions,
    *,
    roles: Roles = Roles(),  # noqa: B008 (frozen)
    resamples: int = 2000,
    seed: int = 0,
    detail: int | None = None,
    title: str = Report.title,
    subject: str = "",
    remarks: Sequence[str] = (),
) -> Report:
    """Build the report from outcomes; see `Report`. detail: None for the middle number of kept tokens."""
    rows = summarise(outcomes, questions, roles, resamples, seed)
    budgets = _budgets(rows, roles)
    detail = budgets[len(budgets) // 2] if detail is None else detail
    kinds, counts = np.unique(np.asarray(questions.kinds, dtype=str), return_counts=True)
    return Report(
        rows=rows,
        questions=len(questions),
        pictures=len(set(questions.images)),
        resamples=resamples,
        budgets=budgets,
        detail=detail,
        kind_counts=dict(zip(kinds.tolist(), counts.tolist(), strict=True)),
        cases=_cases(join_seeds(outcomes, questions), questions, roles, detail),
        roles=roles,
        title=title,
        subject=subject,
        remarks=tuple(remarks),
    )


def _budgets(rows: list[Row], roles: Roles) -> tuple[int, ...]:
    """Numbers of kept tokens of our method, or of all methods if ours is missing, in descending order."""
    ours = {row["kept"] for row in rows if row["method"] == roles.ours}
    several = {row["kept"] for row in rows if row["method"] not in (roles.full, roles.floor)}
    return tuple(sorted(ours or several or {row["kept"] for row in rows}, reverse=True))


def _cases(runs, questions: Questions, roles: Roles, detail: int, most: int = 12) -> list[Case]:
    """Up to `most` cases that were lost and as many that were won, evenly spaced over all such questions."""
    full, ours = only(runs, roles.full), runs.get((roles.ours, detail))
    small = runs.get((roles.downsampled, detail))
    if ours is None or ours.first.not_applicable is not None or not (full.answers and ours.answers):
        return []
    lost = (full.mean >= 0.5) & (ours.mean < 0.5)
    won = np.zeros(len(questions), dtype=bool)
    if small is not None and small.answers:
        won = compression_hard(full.mean, small.mean) & (ours.mean >= 0.5)
    cases = []
    for mask in (lost, won):
        found = np.flatnonzero(mask)
        for i in found[np.unique(np.linspace(0, len(found) - 1, most).astype(int))] if len(found) else []:
            cases.append(
                Case(
                    image=str(questions.images[i]),
                    kind=str(questions.kinds[i]),
                    prompt=questions.prompts[i] if questions.prompts else "",
                    gold=questions.gold[i],
                    full=full.answers[0][i],
                    ours=ours.answers[0][i],
                    downsampled=small.answers[0][i] if small is not None and small.answers else "",
                    lost=mask is lost,
                )
            )
    return cases
