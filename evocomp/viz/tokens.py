"""What a selection looks like on the picture. Grids are (rows, columns) of the N tokens, row-major."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from evocomp.viz.style import ACCENT, COLORS, INK, SOFT, new_figure, save_png


@dataclass(frozen=True)
class SheetItem:
    """One picture of the sheet: [height, width, 3] uint8, the kept tokens, and what was said about it."""

    image: np.ndarray
    kept: Sequence[int]
    grid: tuple[int, int]
    question: str
    full_answer: str
    answer: str
    gold: str | None = None


def patch_of_pixel(shape: tuple[int, ...], grid: tuple[int, int]) -> np.ndarray:
    """Token that each pixel of a picture of `shape` (height, width, ...) belongs to: int [height, width].

    >>> patch_of_pixel((2, 4), (1, 2)).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    (height, width), (rows, columns) = shape[:2], grid
    row = np.arange(height) * rows // height
    column = np.arange(width) * columns // width
    return row[:, None] * columns + column


def light_up(image: np.ndarray, kept: Sequence[int], grid: tuple[int, int], dim: float = 0.25) -> np.ndarray:
    """The picture with kept tokens as they are, all other pixels times `dim`: uint8 [height, width, 3]."""
    image, lit = np.asarray(image, dtype=np.uint8), np.zeros(grid[0] * grid[1], dtype=bool)
    lit[np.asarray(kept, dtype=int)] = True
    dimmed = np.rint(image * dim).astype(np.uint8)
    return np.where(lit[patch_of_pixel(image.shape, grid)][:, :, None], image, dimmed)


def kept_tokens(
    image: np.ndarray, kept: Sequence[int], grid: tuple[int, int], ax: Axes | None = None
) -> Figure:
    """The picture [height, width, 3] with its kept tokens lit and outlined, the others dimmed."""
    ax = _picture_axes(image) if ax is None else ax
    _show(ax, light_up(image, kept, grid))
    lit = np.zeros(grid, dtype=int)
    lit.flat[np.asarray(kept, dtype=int)] = 1
    ax.add_collection(LineCollection(borders(lit, image.shape), colors="white", linewidths=1.4))
    return ax.get_figure()


def kept_sheet(items: Sequence[SheetItem], path: str | Path, columns: int = 4) -> Path:
    """Write a PNG sheet: each picture with its kept tokens lit, under it the question and both answers."""
    columns = min(columns, len(items))
    rows = -(-len(items) // columns)
    figure = new_figure(2.9 * columns, 3.95 * rows)
    left, gap = 0.12 / columns / 2.9, 0.18 / columns / 2.9
    width = (1 - 2 * left - (columns - 1) * gap) / columns
    height = width * (2.9 * columns) / (3.95 * rows)
    for number, item in enumerate(items):
        row, column = divmod(number, columns)
        bottom = 1 - (row + 0.03) / rows - height
        ax = figure.add_axes((left + column * (width + gap), bottom, width, height))
        kept_tokens(item.image, item.kept, item.grid, ax)
        _caption(ax, item)
    return save_png(figure, path)


def kept_row(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 4) -> Figure:
    """Pictures of one size in rows of `columns`, each under its title; see `light_up` for what to show."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(2.7 * columns, 3.3 * rows)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        ax = figure.add_subplot(rows, columns, number + 1)
        _show(ax, image)
        ax.set_title(title, fontsize=12, color=INK)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.17 / rows, wspace=0.06, hspace=0.25)
    return figure


def groups_over_image(
    image: np.ndarray,
    groups: np.ndarray,
    grid: tuple[int, int],
    words: Sequence[str] | Mapping[int, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The picture with the group of each token [N] washed over it; `words[g]` names group g.

    Colours cannot tell forty groups apart, so borders are drawn and groups of three tokens or more named.
    """
    ax = _picture_axes(image) if ax is None else ax
    groups = np.asarray(groups).reshape(grid)
    _show(ax, wash_groups(image, groups, grid))
    ax.add_collection(LineCollection(borders(groups, image.shape), colors="white", linewidths=1.2))
    if words is not None:
        for g, size in zip(*np.unique(groups, return_counts=True), strict=True):
            if size >= 3:
                _name_group(ax, groups == g, words[int(g)], image.shape)
    return ax.get_figure()


def wash_groups(image: np.ndarray, groups: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The picture in grey, tinted by the group of each token [N]: uint8 [height, width, 3]."""
    ids, compact, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    tints = np.empty((len(ids), 3))
    tints[np.argsort(-sizes)] = _tints(len(ids))  # neighbouring hues go to groups of unlike size
    wash = tints[compact.ravel()][patch_of_pixel(image.shape, grid)]
    grey = image.mean(axis=2, keepdims=True)
    return np.rint(0.5 * grey + 0.5 * 255 * wash).astype(np.uint8)


def _tints(count: int) -> np.ndarray:
    """Colours [count, 3] in 0..1: hues by the golden ratio, lightness alternating."""
    number = np.arange(count)
    hues = (0.58 + number * 0.618034) % 1
    return hsv_to_rgb(
        np.stack([hues, np.where(number % 2, 0.5, 0.8), np.where(number % 3, 0.8, 0.97)], axis=1)
    )


def _name_group(ax: Axes, member: np.ndarray, word: str, shape: tuple[int, ...]) -> None:
    """Write the word on the member with most neighbours of the group, the one nearest to its centre."""
    places = np.argwhere(member)
    padded = np.pad(member, 1).astype(int)
    inside = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    distance = np.linalg.norm(places - places.mean(axis=0), axis=1)
    row, column = places[np.lexsort((distance, -inside[member]))[0]]
    x, y = (column + 0.5) * shape[1] / member.shape[1], (row + 0.5) * shape[0] / member.shape[0]
    text = ax.text(x, y, word, ha="center", va="center", fontsize=11, color="white", weight="bold")
    text.set_path_effects([withStroke(linewidth=2.5, foreground=INK)])


def borders(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Line segments [S, 2, 2] in pixels between neighbouring tokens that differ, and around the outermost."""
    framed = np.pad(cells, 1, constant_values=0 if set(np.unique(cells)) <= {0, 1} else -1)
    high, wide = shape[0] / cells.shape[0], shape[1] / cells.shape[1]
    upright = [((c, r), (c, r + 1)) for r, c in np.argwhere(framed[1:-1, 1:] != framed[1:-1, :-1])]
    level = [((c, r), (c + 1, r)) for r, c in np.argwhere(framed[1:, 1:-1] != framed[:-1, 1:-1])]
    return np.array(upright + level, dtype=float).reshape(-1, 2, 2) * (wide, high)


def _picture_axes(image: np.ndarray) -> Axes:
    height, width = image.shape[:2]
    figure = new_figure(4.0, 4.0 * height / width)
    return figure.add_axes((0.01, 0.01, 0.98, 0.98))


def _show(ax: Axes, pixels: np.ndarray) -> None:
    height, width = pixels.shape[:2]
    ax.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
    ax.set_axis_off()


def _caption(ax: Axes, item: SheetItem) -> None:
    """Question, then the two answers; right or wrong is told by a sign and not by colour alone."""
    question = textwrap.shorten(item.question, 64, placeholder=" ...")
    lines = [(textwrap.fill(question, 32), INK, "bold")]
    for who, answer in (("all tokens", item.full_answer), (f"{len(item.kept)} kept", item.answer)):
        sign, color = "", SOFT
        if item.gold is not None:
            right = answer.strip().casefold() == item.gold.strip().casefold()
            sign, color = ("\u2713 ", COLORS[0]) if right else ("\u2717 ", ACCENT)
        lines.append((f"{who}: {sign}{textwrap.shorten(answer, 26, placeholder='...')}", color, "normal"))
    y = -0.035
    for text, color, weight in lines:
        ax.text(0, y, text, transform=ax.transAxes, va="top", fontsize=12, color=color, weight=weight)
        y -= 0.085 * (1 + text.count("\n"))
