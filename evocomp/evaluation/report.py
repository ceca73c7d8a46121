"""The panel's report: what is in it, and report.json, report.md and report.html on disk."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evocomp.evaluation.outcome import AFTER_LLM, BEFORE_LLM, REFERENCE, Outcome, Questions, Roles
from evocomp.evaluation.rows import Row, join_seeds, only, summarise
from evocomp.evaluation.statistics import compression_hard

__all__ = [
    "AFTER_LLM",
    "BEFORE_LLM",
    "REFERENCE",
    "Case",
    "Outcome",
    "Questions",
    "Report",
    "Roles",
    "make_report",
    "summarise",
    "write_report",
]


@dataclass(frozen=True)
class Case:
    """One question on which compression made the difference, for the reader to look at."""

    image: str
    kind: str
    prompt: str
    gold: str
    full: str
    ours: str
    downsampled: str
    lost: bool
    """True: the uncompressed model is right and ours wrong. False: downsampling is wrong and ours right."""


@dataclass(frozen=True)
class Report:
    """Everything that the files show. `detail` is the budget at which methods are looked at more closely."""

    rows: list[Row]
    questions: int
    pictures: int
    resamples: int
    budgets: tuple[int, ...]
    detail: int
    kind_counts: dict[str, int]
    cases: list[Case] = field(default_factory=list)
    roles: Roles = Roles()
    title: str = "What is left after compression"
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
    remarks: Sequence[str] = (),
) -> Report:
    """Rows and all that goes with them. `detail`: budget of the closer look; None = the middle one."""
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
        remarks=tuple(remarks),
    )


def write_report(report: Report, folder: str | Path, sheet: str | Path | None = None) -> dict[str, Path]:
    """Write report.json, report.md and report.html; each replaces its predecessor in one step.

    `sheet` is a PNG that goes into the page. Returns the paths by suffix. The text for the terminal comes
    from `tables.terminal(report)`.
    """
    # these draw and format; a run that only wants rows need not load matplotlib
    from evocomp.evaluation.page import page
    from evocomp.evaluation.tables import markdown

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json.dumps(report.rows, indent=1, allow_nan=False) + "\n",
        "md": markdown(report),
        "html": page(report, Path(sheet).read_bytes() if sheet else None),
    }
    paths = {suffix: folder / f"report.{suffix}" for suffix in texts}
    for suffix, text in texts.items():
        _replace(paths[suffix], text)
    return paths


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _budgets(rows: list[Row], roles: Roles) -> tuple[int, ...]:
    """The table's columns: budgets of ours, or of everything that has one, most tokens first."""
    ours = {row["kept"] for row in rows if row["method"] == roles.ours}
    several = {row["kept"] for row in rows if row["method"] not in (roles.full, roles.floor)}
    return tuple(sorted(ours or several or {row["kept"] for row in rows}, reverse=True))


def _cases(runs, questions: Questions, roles: Roles, detail: int, most: int = 12) -> list[Case]:
    """Up to `most` questions that ours lost and `most` that it won against downsampling, spread evenly."""
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
