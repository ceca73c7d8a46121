"""The tables of a report as data; report.html, report.md and the terminal print the same cells."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from evocomp.evaluation.outcome import GROUPS, REFERENCE
from evocomp.evaluation.report import Case, Report
from evocomp.evaluation.rows import Row
from evocomp.viz.names import display_name

NOTHING = "-"
"""A cell without a number."""


class Cell(NamedTuple):
    """One cell. `detail` is an interval, printed in smaller type below the text, or shown on hover."""

    text: str
    detail: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Line:
    """One row of a table. `ours`: whether it is the evaluated compressor."""

    name: str
    cells: list[Cell]
    ours: bool = False


@dataclass(frozen=True)
class Table:
    """Lines under the headings of their groups.

    Attributes:
        header: names of the columns; the first column has the names of the lines.
        groups: (heading, lines); an empty heading is not printed.
        caption: explanation of the cells.
        detail: name of `Cell.detail` if it is shown on hover; empty: it is printed below the number.
        text: whether the cells contain words instead of numbers.
    """

    title: str
    header: list[str]
    groups: list[tuple[str, list[Line]]]
    caption: str = ""
    detail: str = ""
    text: bool = field(default=False)


def main_table(report: Report) -> Table:
    """Accuracy of all methods at all numbers of kept tokens; the best of each group is bold, including ties."""
    best = _best_of_groups(report)

    def cells(method: str, rows: list[Row]) -> list[Cell]:
        at = {row["kept"]: row for row in rows}
        if not set(at) & set(report.budgets):  # a reference, which has a single number of tokens
            return [_accuracy(rows[0]), *[Cell("")] * (len(report.budgets) - 1)]
        return [_accuracy(at.get(budget), best) for budget in report.budgets]

    caption = (
        "Share of questions answered correctly, in parentheses as a percentage of the uncompressed accuracy. "
        "Bold: the best of a group at that number of kept tokens, including ties."
    )
    header = ["method", *(f"{budget} kept" for budget in report.budgets)]
    groups = _groups(report, report.rows, cells, with_tokens=True)
    return Table("Accuracy by kept tokens", header, groups, caption, detail="95 % interval")


def lead_table(report: Report) -> Table | None:
    """Accuracy of our method minus that of each other method, in percentage points, with interval and p value."""
    ours = {row["kept"]: row for row in report.rows if row["method"] == report.roles.ours}

    def cells(method: str, rows: list[Row]) -> list[Cell]:
        if method == report.roles.full:
            return [_lead(ours.get(budget), "full", 1) for budget in report.budgets]
        at = {row["kept"]: row for row in rows}
        return [_lead(at.get(budget), "evocomp", -1) for budget in report.budgets]

    rows = [
        row for row in report.rows if row["difference_vs_evocomp"] is not None or row["method"] == report.roles.full
    ]
    name = display_name(report.roles.ours)
    caption = (
        f"Accuracy of {name} minus that of the other method at the same number of kept tokens, in percentage points, "
        "with its 95 % interval and paired two-sided p (not corrected for the number of comparisons). Bold: p < 0.05."
    )
    header = ["method", *(f"{budget} kept" for budget in report.budgets)]
    return Table(f"Lead of {name}", header, _groups(report, rows, cells), caption) if ours else None


def measures_table(report: Report) -> Table:
    """Further measures at one number of kept tokens: average over layers, accuracy above chance, loyalty, ..."""

    def cells(method: str, rows: list[Row]) -> list[Cell]:
        row = _at_detail(report, rows)
        spread = f"{row['seeds']} (sd {row['seed_std']:.3f})" if row["seeds"] > 1 else NOTHING
        hard = _number(row["hard"]) if row["hard_n"] else NOTHING
        above, same = _percent(row["retention_above_chance"]), _percent(row["loyalty"])
        return [Cell(text) for text in (f"{row['kept_average']:.1f}", above, same, hard, spread)]

    hard_n = next((row["hard_n"] for row in report.rows if row["kept"] == report.detail and row["hard_n"]), 0)
    header = ["method", "tokens per layer", "accuracy above no image", "same answer as uncompressed"]
    header += [f"hard questions (n = {hard_n:,})", "seeds"]
    caption = (
        "Tokens per layer: visual tokens averaged over the layers of the LLM. Accuracy above no image: (accuracy - "
        "accuracy without the image) / (uncompressed - accuracy without the image). Hard questions: correct when "
        "uncompressed, wrong with the downsampled image of at most as many tokens."
    )
    groups = _groups(report, _detail_rows(report), cells)
    return Table(f"Further measures at {report.detail} kept tokens", header, groups, caption)


def kinds_table(report: Report) -> Table:
    """Accuracy by question type at one number of kept tokens."""
    kinds = list(report.kind_counts)

    def cells(method: str, rows: list[Row]) -> list[Cell]:
        by_kind = _at_detail(report, rows)["by_kind"]
        return [Cell(_number(by_kind.get(kind))) for kind in kinds]

    header = ["method", *(f"{kind or 'all'} (n = {report.kind_counts[kind]:,})" for kind in kinds)]
    title = f"Accuracy by question type at {report.detail} kept tokens"
    return Table(title, header, _groups(report, _detail_rows(report), cells))


def case_tables(report: Report) -> list[Table]:
    """Example questions: one table of answers that compression lost and one of answers that it won."""
    name = display_name(report.roles.ours)
    titles = {
        True: f"Correct when uncompressed, wrong with {name} at {report.detail} kept tokens",
        False: f"Wrong with the downsampled image, correct with {name} at {report.detail} kept tokens",
    }
    header = ["image", "type", "question", "correct answer"]
    header += [display_name(role) for role in ("full", "evocomp", "downsampling")]
    found = {lost: [_case(case) for case in report.cases if case.lost == lost] for lost in titles}
    return [Table(titles[lost], header, [("", lines)], text=True) for lost, lines in found.items() if lines]


def _case(case: Case) -> Line:
    texts = (case.kind, case.prompt, case.gold, case.full, case.ours, case.downsampled)
    return Line(case.image, [Cell(text) for text in texts])


def _groups(
    report: Report, rows: list[Row], cells: Callable[[str, list[Row]], list[Cell]], with_tokens: bool = False
) -> list[tuple[str, list[Line]]]:
    """Methods under the headings of their groups; our method comes first in its group."""
    ours = report.roles.ours
    by_group: dict[str, dict[str, list[Row]]] = {group: {} for group in GROUPS}
    for method, of_method in by_method(rows).items():
        by_group.setdefault(of_method[0]["group"], {})[method] = of_method

    def line(method: str, rows: list[Row]) -> Line:
        name = display_name(method)
        if with_tokens and rows[0]["group"] == REFERENCE and not {row["kept"] for row in rows} & set(report.budgets):
            name = f"{name} ({rows[0]['kept']} tokens)"
        return Line(name, cells(method, rows), method == ours)

    return [
        (group, [line(method, methods[method]) for method in sorted(methods, key=lambda m: m != ours)])
        for group, methods in by_group.items()
        if methods
    ]


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each method, in the given order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _detail_rows(report: Report) -> list[Row]:
    """Rows at `report.detail` kept tokens, and those of methods with a single number of tokens."""
    return [
        row
        for row in report.rows
        if row["accuracy"] is not None and (row["kept"] == report.detail or row["kept"] not in report.budgets)
    ]


def _at_detail(report: Report, rows: list[Row]) -> Row:
    return next((row for row in rows if row["kept"] == report.detail), rows[0])


def _best_of_groups(report: Report) -> dict[tuple[str, int], float]:
    """The best accuracy by (group, kept tokens), rounded as printed; only where there are several methods."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in report.rows:
        if row["accuracy"] is not None and row["group"] != REFERENCE:
            found.setdefault((row["group"], row["kept"]), []).append(round(row["accuracy"], 3))
    return {key: max(values) for key, values in found.items() if len(values) > 1}


def _accuracy(row: Row | None, best: dict[tuple[str, int], float] | None = None) -> Cell:
    if row is None:
        return Cell(NOTHING)
    if row["accuracy"] is None:
        return Cell("n/a")
    strong = (best or {}).get((row["group"], row["kept"])) == round(row["accuracy"], 3)
    relative = "" if row["relative"] is None else f" ({100 * row['relative']:.1f} %)"
    return Cell(f"{row['accuracy']:.3f}{relative}", f"{row['low']:.3f} to {row['high']:.3f}", strong)


def _lead(row: Row | None, other: str, sign: int) -> Cell:
    """The row's difference to `other`, times `sign` (rows contain method - ours and method - uncompressed)."""
    name = f"difference_vs_{other}"
    if row is None or row[name] is None:
        return Cell(NOTHING)
    ends = sorted(100 * sign * row[f"{name}_{end}"] for end in ("low", "high"))
    p = row[f"p_vs_{other}"]
    # adding zero turns -0.0 into 0.0
    interval = f"{ends[0] + 0.0:+.1f} to {ends[1] + 0.0:+.1f},\n" + ("p < 0.001" if p < 0.001 else f"p = {p:.3f}")
    return Cell(f"{100 * sign * row[name] + 0.0:+.1f}", interval, p < 0.05)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"
