"""The report's tables and its plain words, as Markdown, HTML and text for the terminal."""

import html
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from evocomp.evaluation.outcome import AFTER_LLM, BEFORE_LLM, REFERENCE
from evocomp.evaluation.rows import Row
from evocomp.evaluation.statistics import EXACT_UP_TO, TOO_FEW

if TYPE_CHECKING:
    from evocomp.evaluation.report import Report

_NOTHING = "-"


class Cell(NamedTuple):
    text: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings; the first cell of a row is its name."""

    title: str
    header: list[str]
    sections: list[tuple[str, list[list[Cell]]]]


def label(method: str) -> str:
    """A method's name as it is printed."""
    return "EvoComp" if method == "evocomp" else method.replace("_", " ")


def main_table(report: "Report") -> Table:
    """Accuracy (relative %) [interval]: methods by kept tokens; the best of a column is strong."""
    best = {budget: _best(report, budget) for budget in report.budgets}

    def cells(method: str, rows: list[Row]) -> list[Cell]:
        at = {row["kept"]: row for row in rows}
        elsewhere = "; ".join(_accuracy(row) for row in rows if row["kept"] not in report.budgets)
        budgets = [
            Cell(_accuracy(at.get(budget)), at.get(budget) is not None and best[budget] == method)
            for budget in report.budgets
        ]
        return [_name(report, method), Cell(elsewhere or _NOTHING), *budgets]

    header = ["method", "no budget", *(f"{budget} kept" for budget in report.budgets)]
    return Table(
        "Accuracy (% of uncompressed) [95 % interval]", header, _sections(report, report.rows, cells)
    )


def lead_table(report: "Report") -> Table | None:
    """How far ours is ahead of each method and of the uncompressed model, in points, with interval and p."""
    ours = {row["kept"]: row for row in report.rows if row["method"] == report.roles.ours}

    def cells(method: str, rows: list[Row]) -> list[Cell]:
        if method == report.roles.full:
            found = [_lead(ours.get(budget), "full", 1) for budget in report.budgets]
        else:
            at = {row["kept"]: row for row in rows}
            found = [_lead(at.get(budget), "evocomp", -1) for budget in report.budgets]
        return [_name(report, method), *found]

    rows = [
        row
        for row in report.rows
        if row["difference_vs_evocomp"] is not None or row["method"] == report.roles.full
    ]
    title = (
        f"Points by which {label(report.roles.ours)} leads [95 % interval], paired p; strong where p < 0.05"
    )
    header = ["over", *(f"{budget} kept" for budget in report.budgets)]
    return Table(title, header, _sections(report, rows, cells)) if ours else None


def measures_table(report: "Report") -> Table:
    """At one budget: layer average, retention above chance, loyalty, hard questions, seeds."""

    def cells(method: str, rows: list[Row]) -> list[Cell]:
        row = _at_detail(report, rows)
        spread = _NOTHING if row["seeds"] < 2 else f"{row['seeds']} (sd {row['seed_std']:.3f})"
        hard = _number(row["hard"]) if row["hard_n"] else _NOTHING
        return [
            _name(report, method),
            Cell(f"{row['kept_average']:.1f}"),
            Cell(_percent(row["retention_above_chance"])),
            Cell(_percent(row["loyalty"])),
            Cell(hard),
            Cell(spread),
        ]

    hard_n = next((row["hard_n"] for row in report.rows if row["kept"] == report.detail and row["hard_n"]), 0)
    header = ["method", "tokens per layer", "kept above chance", "same answer as uncompressed"]
    header += [f"hard questions (n = {hard_n:,})", "seeds"]
    return Table(f"More about {report.detail} kept", header, _sections(report, _detail_rows(report), cells))


def kinds_table(report: "Report") -> Table:
    """At one budget: accuracy by type of question."""
    kinds = list(report.kind_counts)

    def cells(method: str, rows: list[Row]) -> list[Cell]:
        by_kind = _at_detail(report, rows)["by_kind"]
        return [_name(report, method), *(Cell(_number(by_kind.get(kind))) for kind in kinds)]

    header = ["method", *(f"{kind or 'all'} (n = {report.kind_counts[kind]:,})" for kind in kinds)]
    title = f"Accuracy by type of question, {report.detail} kept"
    return Table(title, header, _sections(report, _detail_rows(report), cells))


def how_made(report: "Report") -> str:
    """In plain words: how many questions, and what the brackets mean."""
    per_picture = report.questions / report.pictures
    return (
        f"Every method answered the same {report.questions:,} questions about {report.pictures:,} pictures "
        f"({per_picture:.1f} a picture). A number is the share of them answered rightly; in round brackets, "
        f"that share as a percentage of what the uncompressed model gets. Square brackets hold a 95 % "
        f"interval: the pictures were drawn again {report.resamples:,} times with replacement, all questions "
        f"of a picture together because they stand or fall together, and the interval spans the middle 95 % "
        f"of what was found. Differences are taken question by question on the same draws, so they are surer "
        f"than two overlapping intervals suggest. {_of_p(report)}\n\n"
        f'"Kept" counts visual tokens at the LLM\'s door; where a method drops or merges tokens later, their '
        f"average over the LLM's layers stands in the notes. Kept above chance is (accuracy - accuracy "
        f"without the picture) / (uncompressed - accuracy without the picture). Hard questions are those "
        f"that the uncompressed model gets right and a smaller picture of at most as many tokens gets wrong."
    )


def _of_p(report: "Report") -> str:
    exact = f"exact: the share of all ways to swap the two methods image by image ({report.pictures} images)"
    how = f", {exact}," if report.pictures <= EXACT_UP_TO else ""
    return f"p is two-sided{how} and not corrected for the number of comparisons."


def few_images(report: "Report") -> str | None:
    """A warning that there are too few images for intervals; None if there are enough."""
    if report.pictures >= TOO_FEW:
        return None
    return (
        f"Only {report.pictures} image{'s' * (report.pictures != 1)} judged: the intervals mean nothing, and no "
        f"two-sided p can be below {2 / 2**report.pictures:.2g}. Judge on at least {TOO_FEW} images (--questions)."
    )


def notes(report: "Report") -> list[str]:
    """A warning if there are too few images, one line a method that has something to say, then remarks on the whole."""
    warning = few_images(report)
    lines = [] if warning is None else [warning]
    for method, rows in _by_method(report.rows).items():
        said = list(dict.fromkeys(row["note"] for row in rows if row["note"]))
        uneven = [
            row for row in rows if row["kept_average"] is not None and row["kept_average"] != row["kept"]
        ]
        if uneven:
            pairs = ", ".join(f"{row['kept_average']:.1f} at {row['kept']}" for row in uneven)
            said.append(f"average tokens over the LLM's layers: {pairs}")
        said += dict.fromkeys(
            f"not applicable: {row['not_applicable']}" for row in rows if row["not_applicable"]
        )
        if said:
            lines.append(f"{label(method)}: {'; '.join(said)}.")
    return [*lines, *report.remarks]


def all_tables(report: "Report") -> list[Table]:
    tables = [main_table(report), lead_table(report), measures_table(report), kinds_table(report)]
    return [table for table in tables if table is not None]


def markdown(report: "Report") -> str:
    """The whole of report.md."""
    first, *rest = all_tables(report)
    parts = [f"# {report.title}", table_markdown(first), how_made(report)]
    parts += ["\n".join(f"- {_escape(line)}" for line in notes(report))]
    parts += [f"## {table.title}\n\n{table_markdown(table)}" for table in rest]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_markdown(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [line(map(_escape, table.header)), line(["---", *["---:"] * (len(table.header) - 1)])]
    for heading, rows in table.sections:
        lines.append(line([f"*{_escape(heading)}*", *[""] * (len(table.header) - 1)]))
        lines += [
            line(f"**{_escape(c.text)}**" if c.strong else _escape(c.text) for c in row) for row in rows
        ]
    return "\n".join(lines)


def table_html(table: Table) -> str:
    def line(tag: str, cells: Iterable[Cell]) -> str:
        marked = (f"<b>{html.escape(c.text)}</b>" if c.strong else html.escape(c.text) for c in cells)
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in marked) + "</tr>"

    body = []
    for heading, rows in table.sections:
        body.append(f'<tr class="group"><td colspan="{len(table.header)}">{html.escape(heading)}</td></tr>')
        body += [line("td", row) for row in rows]
    head = line("th", map(Cell, table.header))
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def terminal(report: "Report") -> str:
    """The main table as plain text, without intervals: accuracy and % of uncompressed."""

    def cells(method: str, rows: list[Row]) -> list[Cell]:
        at = {row["kept"]: row for row in rows}
        elsewhere = " ".join(_short(row) for row in rows if row["kept"] not in report.budgets)
        return [_name(report, method), Cell(elsewhere), *(Cell(_short(at.get(b))) for b in report.budgets)]

    sections = _sections(report, report.rows, cells)
    header = ["", "no budget", *(f"{budget} kept" for budget in report.budgets)]
    grid = [header, *([cell.text for cell in row] for _, rows in sections for row in rows)]
    widths = [max(len(line[column]) for line in grid) for column in range(len(header))]

    def line(texts: list[str]) -> str:
        first, *others = [text.rjust(width) for text, width in zip(texts, widths, strict=True)]
        return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()

    lines = [line(header)]
    for heading, rows in sections:
        lines += [f"-- {heading}", *(line([cell.text for cell in row]) for row in rows)]
    half = [(row["high"] - row["low"]) / 2 for row in report.rows if row["accuracy"] is not None]
    lines.append(
        f"accuracy (% of uncompressed); {report.questions:,} questions, {report.pictures:,} pictures; "
        f"95 % intervals are up to +-{max(half):.3f} wide, differences are surer: see report.md"
    )
    warning = few_images(report)
    return "\n".join(lines if warning is None else [*lines, warning])


def _sections(report: "Report", rows: list[Row], cells) -> list[tuple[str, list[list[Cell]]]]:
    """Methods under the headings of their groups, in order; ours comes first in its group."""
    ours = report.roles.ours
    by_group: dict[str, dict[str, list[Row]]] = {group: {} for group in (REFERENCE, BEFORE_LLM, AFTER_LLM)}
    for method, of_method in _by_method(rows).items():
        by_group.setdefault(of_method[0]["group"], {})[method] = of_method
    return [
        (group, [cells(method, methods[method]) for method in sorted(methods, key=lambda m: m != ours)])
        for group, methods in by_group.items()
        if methods
    ]


def _by_method(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _detail_rows(report: "Report") -> list[Row]:
    """Methods that have a number at the detail budget, or that have no budget."""
    return [
        row
        for row in report.rows
        if row["accuracy"] is not None and (row["kept"] == report.detail or row["kept"] not in report.budgets)
    ]


def _at_detail(report: "Report", rows: list[Row]) -> Row:
    return next((row for row in rows if row["kept"] == report.detail), rows[0])


def _best(report: "Report", budget: int) -> str | None:
    rows = [row for row in report.rows if row["kept"] == budget and row["accuracy"] is not None]
    rows = [row for row in rows if row["group"] != REFERENCE]
    return max(rows, key=lambda row: row["accuracy"])["method"] if rows else None


def _name(report: "Report", method: str) -> Cell:
    return Cell(label(method), method == report.roles.ours)


def _accuracy(row: Row | None) -> str:
    if row is None:
        return _NOTHING
    if row["accuracy"] is None:
        return "n/a"
    relative = "" if row["relative"] is None else f" ({100 * row['relative']:.1f} %)"
    return f"{row['accuracy']:.3f}{relative} [{row['low']:.3f}, {row['high']:.3f}]"


def _short(row: Row | None) -> str:
    if row is None:
        return _NOTHING
    if row["accuracy"] is None:
        return "n/a"
    return f"{row['accuracy']:.3f}" + ("" if row["relative"] is None else f" ({100 * row['relative']:5.1f})")


def _lead(row: Row | None, other: str, sign: int) -> Cell:
    """The row's difference to `other`, times `sign` (rows hold method - ours and method - uncompressed)."""
    name = f"difference_vs_{other}"
    if row is None or row[name] is None:
        return Cell(_NOTHING)
    ends = sorted(100 * sign * row[f"{name}_{end}"] for end in ("low", "high"))
    p = row[f"p_vs_{other}"]
    # adding zero turns -0.0 into 0.0
    numbers = f"{100 * sign * row[name] + 0.0:+.1f} [{ends[0] + 0.0:+.1f}, {ends[1] + 0.0:+.1f}]"
    return Cell(f"{numbers} " + ("p < 0.001" if p < 0.001 else f"p = {p:.3f}"), p < 0.05)


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return _NOTHING if value is None else f"{100 * value:.1f} %"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
