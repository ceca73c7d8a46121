"""Writes report.json, report.md and report.html; the last two from one list of blocks with jinja2 templates."""

import base64
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from evocomp.evaluation.report import Report
from evocomp.evaluation.summary import how_made, judged, notes, verdict, warnings
from evocomp.evaluation.tables import case_tables, kinds_table, lead_table, main_table, measures_table
from evocomp.viz import retention_curve, to_svg
from evocomp.viz.names import display_name


@dataclass(frozen=True)
class Block:
    """One part of the report. `kind`: warning, verdict, paragraph, list, chart, images or table."""

    kind: str
    content: Any
    title: str = ""


def write_report(report: Report, folder: str | Path, sheet: str | Path | None = None) -> dict[str, Path]:
    """Write report.json, report.md and report.html; each replaces an existing file atomically.

    Args:
        folder: created if it does not exist.
        sheet: PNG of images with their kept tokens; embedded in report.html, linked in report.md.

    Returns:
        Paths of the files, with the suffix as key.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    blocks = build_blocks(report, None if sheet is None else Path(sheet))
    texts = {
        "json": json.dumps(report.rows, indent=1, allow_nan=False) + "\n",
        "md": markdown(report, blocks, folder),
        "html": page(report, blocks),
    }
    paths = {suffix: folder / f"report.{suffix}" for suffix in texts}
    for suffix, text in texts.items():
        _replace(paths[suffix], text)
    return paths


def build_blocks(report: Report, sheet: Path | None = None) -> list[Block]:
    """The blocks in the order of the page: warnings, verdict, chart, images, tables, explanation of the numbers."""
    blocks = [Block("warning", text) for text in warnings(report)]
    blocks += [Block("verdict", " ".join(verdict(report)))]
    if any(row["relative"] is not None for row in report.rows):  # else the uncompressed accuracy is 0
        blocks += [Block("chart", retention_curve(report.rows, report.roles.ours), "Accuracy against kept tokens")]
    if sheet is not None:
        blocks += [Block("images", sheet, f"Tokens that {display_name(report.roles.ours)} keeps")]
    tables = [main_table(report), lead_table(report), measures_table(report), kinds_table(report)]
    blocks += [Block("table", table, table.title) for table in [*tables, *case_tables(report)] if table is not None]
    paragraphs = how_made(report)
    blocks += [Block("paragraph", text, "How the numbers are computed" * (i == 0)) for i, text in enumerate(paragraphs)]
    listed = notes(report)
    return blocks + [Block("list", listed, "Notes")] * bool(listed)


def page(report: Report, blocks: list[Block]) -> str:
    """The content of report.html, which is self-contained."""
    environment = _environment(autoescape=True)
    environment.filters["svg"] = to_svg
    environment.filters["data_url"] = _data_url
    template = environment.get_template("report.html.jinja")
    return template.render(report=report, subject=judged(report), blocks=blocks)


def markdown(report: Report, blocks: list[Block], folder: Path = Path()) -> str:
    """The content of report.md. folder: its folder; the path of the images is relative to it."""
    environment = _environment(finalize=escape_markdown)
    environment.filters["relative"] = lambda path: os.path.relpath(path, folder)
    template = environment.get_template("report.md.jinja")
    return template.render(report=report, subject=judged(report), blocks=blocks).strip() + "\n"


def escape_markdown(value: object) -> str:
    """Escape text for Markdown, so that it is shown literally, in one line and in one cell of a table.

    >>> print(escape_markdown("a|b <i>*c*_d_"))
    a\\|b \\<i\\>\\*c\\*\\_d\\_
    """
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", " ".join(str(value).split()))


def _environment(**options) -> jinja2.Environment:
    loader = jinja2.PackageLoader("evocomp.evaluation")
    return jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
