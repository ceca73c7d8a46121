"""Kept tokens and groups drawn on their image. Grids are (rows, columns) of the N tokens, row-major."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from evocomp.viz.style import COLORS, INK, new_figure


def patch_of_pixel(shape: tuple[int, ...], grid: tuple[int, int]) -> np.ndarray:
    """Index of the token of each pixel of an image of `shape` (height, width, ...): int [height, width].

    >>> patch_of_pixel((2, 4), (1, 2)).tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    (height, width), (rows, columns) = shape[:2], grid
    row = np.arange(height) * rows // height
    column = np.arange(width) * columns // width
    return row[:, None] * columns + column


def light_up(
    image: np.ndarray, kept: Sequence[int], grid: tuple[int, int], dim: float = 0.25, context: Sequence[int] = ()
) -> np.ndarray:
    """The image with kept tokens unchanged and all other pixels times `dim`: uint8 [height, width, 3].

    context: indices of context tokens, whose pixels are halfway between the two.
    """
    image, factor = np.asarray(image, dtype=np.uint8), np.full(grid[0] * grid[1], dim)
    factor[np.asarray(context, dtype=int)] = (1 + dim) / 2
    factor[np.asarray(kept, dtype=int)] = 1
    return np.rint(image * factor[patch_of_pixel(image.shape, grid)][:, :, None]).astype(np.uint8)


def kept_tokens(
    image: np.ndarray,
    kept: Sequence[int],
    grid: tuple[int, int],
    ax: Axes | None = None,
    context: Sequence[int] = (),
) -> Figure:
    """The image [height, width, 3] with its kept tokens highlighted and outlined, the others dimmed.

    Selected tokens (`kept`) have a white outline, context tokens a blue one.
    """
    ax = _image_axes(image) if ax is None else ax
    _show(ax, light_up(image, kept, grid, context=context))
    for tokens, color in ((context, COLORS[4]), (kept, "white")):
        lit = np.zeros(grid, dtype=int)
        lit.flat[np.asarray(tokens, dtype=int)] = 1
        if lit.any():
            ax.add_collection(LineCollection(borders(lit, image.shape), colors=color, linewidths=1.4))
    return ax.get_figure()


def kept_row(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 4) -> Figure:
    """Images of one size in rows of `columns`, each under its title; see `light_up`."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(2.7 * columns, 3.3 * rows)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        ax = figure.add_subplot(rows, columns, number + 1)
        _show(ax, image)
        ax.set_title(title, fontsize=12, color=INK, parse_math=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.17 / rows, wspace=0.06, hspace=0.25)
    return figure


def groups_over_image(
    image: np.ndarray,
    groups: np.ndarray,
    grid: tuple[int, int],
    words: Sequence[str] | Mapping[int, str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The image tinted by the group of each token [N]; `words[g]` is the name of group g.

    Many groups cannot all have distinguishable colours, so borders are drawn, and groups of three tokens or more named.
    """
    ax = _image_axes(image) if ax is None else ax
    groups = np.asarray(groups).reshape(grid)
    _show(ax, wash_groups(image, groups, grid))
    ax.add_collection(LineCollection(borders(groups, image.shape), colors="white", linewidths=1.2))
    if words is not None:
        for g, size in zip(*np.unique(groups, return_counts=True), strict=True):
            if size >= 3:
                _name_group(ax, groups == g, words[int(g)], image.shape)
    return ax.get_figure()


def wash_groups(image: np.ndarray, groups: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image in grey, tinted by the group of each token [N]: uint8 [height, width, 3]."""
    ids, compact, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    tints = np.empty((len(ids), 3))
    tints[np.argsort(-sizes)] = _tints(len(ids))  # groups of similar size get distant hues
    wash = tints[compact.ravel()][patch_of_pixel(image.shape, grid)]
    grey = image.mean(axis=2, keepdims=True)
    return np.rint(0.5 * grey + 0.5 * 255 * wash).astype(np.uint8)


def _tints(count: int) -> np.ndarray:
    """Colours [count, 3] in 0..1: hues by the golden ratio, lightness alternating."""
    number = np.arange(count)
    hues = (0.58 + number * 0.618034) % 1
    return hsv_to_rgb(np.stack([hues, np.where(number % 2, 0.5, 0.8), np.where(number % 3, 0.8, 0.97)], axis=1))


def _name_group(ax: Axes, member: np.ndarray, word: str, shape: tuple[int, ...]) -> None:
    """Write the word on the token with most neighbours in the group; in a tie, on the one nearest to the centre."""
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


def _image_axes(image: np.ndarray) -> Axes:
    height, width = image.shape[:2]
    figure = new_figure(4.0, 4.0 * height / width)
    return figure.add_axes((0.01, 0.01, 0.98, 0.98))


def _show(ax: Axes, pixels: np.ndarray) -> None:
    height, width = pixels.shape[:2]
    ax.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
    ax.set_axis_off()
