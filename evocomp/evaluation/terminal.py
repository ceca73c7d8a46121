"""The main table of a report as plain text for the terminal."""

from evocomp.evaluation.report import Report
from evocomp.evaluation.summary import verdict, warnings
from evocomp.evaluation.tables import main_table


def terminal(report: Report) -> str:
    """Accuracy and percentage of the uncompressed accuracy by kept tokens, then the warnings and the verdict."""
    table = main_table(report)
    grid = [["", *table.header[1:]]]
    grid += [[line.name, *(cell.text for cell in line.cells)] for _, lines in table.groups for line in lines]
    widths = [max(len(texts[column]) for texts in grid) for column in range(len(table.header))]

    def aligned(texts: list[str]) -> str:
        first, *others = [text.rjust(width) for text, width in zip(texts, widths, strict=True)]
        return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()

    lines = [aligned(grid[0])]
    for heading, rows in table.groups:
        lines += [f"-- {heading}", *(aligned([row.name, *(cell.text for cell in row.cells)]) for row in rows)]
    lines.append(f"accuracy (% of uncompressed); {report.questions:,} questions about {report.pictures:,} images")
    return "\n".join([*lines, *(f"warning: {text}" for text in warnings(report)), " ".join(verdict(report))])
