"""The sentences of a report: subject, verdict, warnings, explanation of the numbers, notes on methods."""

from collections.abc import Sequence

from evocomp.evaluation.outcome import AFTER_LLM, BEFORE_LLM, INSIDE_LLM, WITH_CONTEXT
from evocomp.evaluation.report import Report
from evocomp.evaluation.rows import Row
from evocomp.evaluation.statistics import EXACT_UP_TO, TOO_FEW
from evocomp.evaluation.tables import by_method
from evocomp.viz.names import display_name

FEWEST_QUESTIONS = 100
FEWEST_IMAGES = 30
LEVEL = 0.05
"""Largest p at which the verdict calls one method better than another."""


def judged(report: Report) -> str:
    """One line: run, model and recipe if known, and the numbers of questions and images."""
    counts = f"{report.questions:,} questions about {report.pictures:,} images"
    return f"{report.subject} · {counts}" if report.subject else counts


def warnings(report: Report) -> list[str]:
    """A warning if there are too few questions or images for reliable numbers."""
    if report.questions >= FEWEST_QUESTIONS and report.pictures >= FEWEST_IMAGES:
        return []
    text = (
        f"Only {report.questions:,} questions about {report.pictures:,} images were evaluated. Intervals, p values and "
        f"the order of methods are unreliable below {FEWEST_QUESTIONS} questions or {FEWEST_IMAGES} images: evaluate "
        "more of them (evocomp eval --questions N --out DIR)."
    )
    if report.pictures < TOO_FEW:
        text += f" With so few images, no two-sided p value can be below {2 / 2**report.pictures:.2g}."
    return [text]


def verdict(report: Report) -> list[str]:
    """What the report shows, in a few sentences; without a ranking if there are `warnings`."""
    ours = {row["kept"]: row for row in report.rows if row["method"] == report.roles.ours}
    ours = {budget: ours[budget] for budget in report.budgets if budget in ours}
    full = next((row for row in report.rows if row["method"] == report.roles.full), None)
    if full is None or not full["accuracy"]:
        return ["The uncompressed model answers none of these questions correctly, so there is nothing to compare."]
    if not ours or any(row["accuracy"] is None for row in ours.values()):
        return [f"The uncompressed model answers {100 * full['accuracy']:.1f} % of the questions correctly."]
    name = display_name(report.roles.ours)
    shares = " / ".join(f"{100 * row['relative']:.1f}" for row in ours.values())
    budgets = " / ".join(map(str, ours))
    first = (
        f"With {budgets} of {full['kept']} visual tokens, {name} reaches {shares} % of the uncompressed accuracy "
        f"({full['accuracy']:.3f})."
    )
    return [first] if warnings(report) else [first, *_ranking(report, list(ours))]


def _ranking(report: Report, budgets: Sequence[int]) -> list[str]:
    """Sentences on where our method is better than, equal to and worse than the others; empty cases are left out."""
    before = {budget: _others(report, budget, (BEFORE_LLM, WITH_CONTEXT)) for budget in budgets}
    before = {budget: rows for budget, rows in before.items() if rows}
    ahead = [b for b, rows in before.items() if all(_sign(row) < 0 for row in rows)]
    behind = {b: [row for row in rows if _sign(row) > 0] for b, rows in before.items()}
    behind = {b: rows for b, rows in behind.items() if rows}
    level = {b: [row for row in rows if _sign(row) == 0] for b, rows in before.items() if b not in behind}
    level = {b: rows for b, rows in level.items() if rows}
    found = []
    if ahead:
        found.append(
            f"It is better than every other method that selects or merges tokens before the LLM at {_listed(ahead)} "
            f"kept tokens (paired p < {LEVEL} against each)."
        )
    if level:
        found.append(
            f"At {_listed(list(level))} kept tokens none of these methods is better, and the difference to "
            f"{_names(level)} is not significant."
        )
    if behind:
        found.append(f"At {_listed(list(behind))} kept tokens it is behind {_names(behind)} (p < {LEVEL}).")
    after = {b: _others(report, b, (AFTER_LLM, INSIDE_LLM)) for b in budgets}
    after = {b: better for b, rows in after.items() if (better := [row for row in rows if _sign(row) > 0])}
    if after:
        found.append(
            f"Of the methods that let the LLM process more tokens, {_names(after)} "
            f"{'are' if len(_methods(after)) > 1 else 'is'} better at {_listed(list(after))} kept tokens."
        )
    return found


def _others(report: Report, budget: int, groups: Sequence[str]) -> list[Row]:
    return [
        row
        for row in report.rows
        if row["kept"] == budget and row["group"] in groups and row["difference_vs_evocomp"] is not None
    ]


def _sign(row: Row) -> int:
    """1 if this method is significantly better than ours, -1 if it is worse, else 0."""
    if row["p_vs_evocomp"] >= LEVEL:
        return 0
    return 1 if row["difference_vs_evocomp"] > 0 else -1


def _methods(rows_by_budget: dict[int, list[Row]]) -> list[str]:
    rows = sorted((row for rows in rows_by_budget.values() for row in rows), key=lambda row: -row["accuracy"])
    return list(dict.fromkeys(row["method"] for row in rows))


def _names(rows_by_budget: dict[int, list[Row]], most: int = 3) -> str:
    names = [display_name(method) for method in _methods(rows_by_budget)]
    rest = [f"{len(names) - most} others"] if len(names) > most + 1 else names[most:]
    return _listed(names[:most] + rest)


def _listed(items: Sequence) -> str:
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def how_made(report: Report) -> list[str]:
    """How the numbers are computed; one paragraph per item."""
    return [
        f"All methods answered the same {report.questions:,} questions about {report.pictures:,} images "
        f"({report.questions / report.pictures:.1f} questions per image). Kept tokens are the visual tokens that "
        "enter the LLM. Methods that drop or merge tokens between the layers of the LLM process more of them on "
        "average; the notes and the table of further measures give the numbers.",
        f"The 95 % intervals are a bootstrap over images ({report.resamples:,} resamples with replacement): the "
        "questions about one image are not independent and are resampled together. Differences between two methods "
        "are paired by question and use the same resamples, so they are more precise than a comparison of two "
        f"intervals. {_tests(report)} and not corrected for the number of comparisons.",
    ]


def _tests(report: Report) -> str:
    if report.pictures > EXACT_UP_TO:
        return "All p values are two-sided"
    return "All p values come from the exact sign-flip test over images, because there are few; they are two-sided"


def notes(report: Report) -> list[str]:
    """One line for each method that has a note, then the remarks of the report."""
    lines = []
    for method, rows in by_method(report.rows).items():
        texts = list(dict.fromkeys(row["note"] for row in rows if row["note"]))
        uneven = [row for row in rows if row["kept_average"] is not None and row["kept_average"] != row["kept"]]
        if uneven:
            pairs = ", ".join(f"{row['kept_average']:.1f} at {row['kept']} kept" for row in uneven)
            texts.append(f"visual tokens averaged over the layers of the LLM: {pairs}")
        texts += dict.fromkeys(f"not applicable: {row['not_applicable']}" for row in rows if row["not_applicable"])
        if texts:
            lines.append(f"{display_name(method)}: {'; '.join(texts)}.")
    return [*lines, *report.remarks]
