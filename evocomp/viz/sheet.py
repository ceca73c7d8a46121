"""A sheet of images with their kept tokens, each above its question and answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from evocomp.viz.style import ACCENT, COLORS, INK, SOFT, new_figure, save_png
from evocomp.viz.tokens import kept_tokens

# inches
_WIDTH = 2.9  # of an image
_TALLEST = 4.4
_GAP = 0.22
_LINE = 0.215  # from one line of a caption to the next
_SIZE = 12  # of the font, in points
_MOST_LINES = 4


@dataclass(frozen=True)
class SheetItem:
    """One image of the sheet: [height, width, 3] uint8, its kept tokens, the question and the answers.

    Attributes:
        kept: indices of the selected tokens.
        context: indices of the context tokens, which are kept in addition.
        gold: the correct answer, if known.
    """

    image: np.ndarray
    kept: Sequence[int]
    grid: tuple[int, int]
    question: str
    full_answer: str
    answer: str
    gold: str | None = None
    context: Sequence[int] = ()


@dataclass(frozen=True)
class _Cell:
    """An item with its size in inches and its caption: (text of one line, colour, weight)."""

    item: SheetItem
    width: float
    height: float
    caption: list[tuple[str, str, str]]

    @property
    def total(self) -> float:
        return self.height + _LINE * (len(self.caption) + 0.8)


def kept_sheet(items: Sequence[SheetItem], path: str | Path, columns: int = 4) -> Path:
    """Write a PNG sheet: each image with its kept tokens highlighted, below it the question and both answers.

    Rows are as tall as their tallest image and longest caption, so that nothing overlaps.
    """
    columns = min(columns, len(items))
    cells = [_cell(item) for item in items]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    wide = columns * (_WIDTH + _GAP) + _GAP
    high = sum(max(cell.total for cell in row) for row in rows) + _GAP
    figure = new_figure(wide, high)
    top = high - _GAP / 2
    for row in rows:
        for column, cell in enumerate(row):
            _draw(figure, cell, _GAP + column * (_WIDTH + _GAP), top, (wide, high))
        top -= max(cell.total for cell in row)
    return save_png(figure, path)


def _cell(item: SheetItem) -> _Cell:
    pixels_high, pixels_wide = item.image.shape[:2]
    scale = min(_WIDTH / pixels_wide, _TALLEST / pixels_high)
    lines = [(line, INK, "bold") for line in wrap(item.question, "bold")]
    total = len(item.kept) + len(item.context)
    kept = f"{total} kept ({len(item.kept)} + {len(item.context)} context)" if len(item.context) else f"{total} kept"
    for who, answer in (("uncompressed", item.full_answer), (kept, item.answer)):
        sign, color = "", SOFT
        if item.gold is not None:
            right = answer.strip().casefold() == item.gold.strip().casefold()
            # a check mark or cross as well, for colour-blind readers
            sign, color = ("\u2713 ", COLORS[0]) if right else ("\u2717 ", ACCENT)
        lines += [(line, color, "normal") for line in wrap(f"{who}: {sign}{answer}", "normal", 2)]
    return _Cell(item, pixels_wide * scale, pixels_high * scale, lines)


def _draw(figure: Figure, cell: _Cell, left: float, top: float, size: tuple[float, float]) -> None:
    """The cell with its upper left corner at (left, top) in inches from the lower left corner of the figure."""
    wide, high = size
    box = (left / wide, (top - cell.height) / high, cell.width / wide, cell.height / high)
    kept_tokens(cell.item.image, cell.item.kept, cell.item.grid, figure.add_axes(box), cell.item.context)
    for number, (text, color, weight) in enumerate(cell.caption):
        y = top - cell.height - _LINE * (number + 0.35)
        figure.text(left / wide, y / high, text, va="top", fontsize=_SIZE, color=color, weight=weight, parse_math=False)


def wrap(text: str, weight: str = "normal", most: int = _MOST_LINES) -> list[str]:
    """The text in at most `most` lines no wider than an image, measured in the font of the captions.

    A word that is wider than a line is broken; what does not fit is replaced by an ellipsis.
    """
    lines, current = [], ""
    for piece in re.findall(r"\S+|\s", " ".join(text.split())):
        while _inches(current + piece, weight) > _WIDTH:
            if current.strip() and _inches(piece, weight) <= _WIDTH:
                lines.append(current.rstrip())
                current = ""
                continue
            cut = _fitting(current + piece, weight)
            lines.append((current + piece)[:cut])
            current, piece = "", (current + piece)[cut:]
        current = (current + piece).lstrip()
    lines = [*lines, current.rstrip()] if current.strip() or not lines else lines
    if len(lines) > most:
        last = lines[most - 1]
        while last and _inches(last + "\u2026", weight) > _WIDTH:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "\u2026"]
    return lines


def _fitting(text: str, weight: str) -> int:
    """Number of characters that fit into a line, at least one."""
    count = 1
    while count < len(text) and _inches(text[: count + 1], weight) <= _WIDTH:
        count += 1
    return count


@cache
def _inches(text: str, weight: str) -> float:
    font = FontProperties(size=_SIZE, weight=weight)
    return _path().get_text_width_height_descent(text, font, ismath=False)[0] / 72


@cache
def _path() -> TextToPath:
    return TextToPath()
