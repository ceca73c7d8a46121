"""report.html: one file that needs nothing else, for people who want to look."""

import base64
import html
from collections.abc import Iterable
from typing import TYPE_CHECKING

from evocomp.evaluation.tables import all_tables, how_made, label, notes, table_html
from evocomp.viz import retention_curve, to_svg

if TYPE_CHECKING:
    from evocomp.evaluation.report import Case, Report

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2430; background: #fff; margin: 2rem auto;
       padding: 0 1rem; max-width: 76rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #1f2430; } tbody td { border-bottom: 1px solid #e4e7ee; }
tr.group td { background: #f3f5f9; color: #4a5266; font-style: italic; }
table.cases td, table.cases th { text-align: left; }
img, svg { max-width: 100%; height: auto; }
p, li { max-width: 60rem; }
"""


def page(report: "Report", sheet: bytes | None = None) -> str:
    """The whole page; `sheet` is a PNG of pictures with their kept tokens."""
    first, *rest = all_tables(report)
    parts = [
        f"<h1>{html.escape(report.title)}</h1>",
        f"<h2>{html.escape(first.title)}</h2>",
        table_html(first),
    ]
    parts += [f"<p>{html.escape(text)}</p>" for text in how_made(report).split("\n\n")]
    parts.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes(report)) + "</ul>")
    if any(row["relative"] is not None for row in report.rows):  # else the model answers nothing rightly
        parts += ["<h2>Accuracy against tokens kept</h2>", to_svg(retention_curve(report.rows))]
    for table in rest:
        parts += [f"<h2>{html.escape(table.title)}</h2>", table_html(table)]
    if sheet is not None:
        data = base64.b64encode(sheet).decode("ascii")
        parts += [
            "<h2>What is kept</h2>",
            f'<img alt="pictures, kept tokens lit" src="data:image/png;base64,{data}">',
        ]
    lost, won = (
        _cases(report, [case for case in report.cases if case.lost == which]) for which in (True, False)
    )
    name = html.escape(label(report.roles.ours))
    if lost:
        parts += [f"<h2>Lost by compression: {name}, {report.detail} kept</h2>", lost]
    if won:
        parts += [f"<h2>Wrong on a smaller picture, right with {name}, {report.detail} kept</h2>", won]
    head = f'<meta charset="utf-8"><title>{html.escape(report.title)}</title><style>{_STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width">'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _cases(report: "Report", cases: list["Case"]) -> str:
    if not cases:
        return ""

    def line(tag: str, texts: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    names = [
        "picture",
        "type",
        "question",
        "right answer",
        "uncompressed",
        label(report.roles.ours),
        "downsampled",
    ]
    body = "".join(
        line("td", (c.image, c.kind, c.prompt, c.gold, c.full, c.ours, c.downsampled)) for c in cases
    )
    table = f"<thead>{line('th', names)}</thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="cases">{table}</table></div>'
