"""Common style of all figures, without pyplot, in colours that colour-blind readers can distinguish."""

import io
import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, FAINT, PAPER = "#1f2430", "#6b7285", "#d9dde6", "#ffffff"
ACCENT = "#D55E00"
# Okabe & Ito 2008, without the yellow, which is hard to see on white, and without the accent colour
COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7a4fa3", "#4d4d4d", "#8c6d31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure without a window, sizes in inches. It does not change the user's matplotlib settings."""
    return Figure(figsize=(width, height), dpi=150, facecolor=PAPER)


def plain_axes(figure: Figure, xlabel: str, ylabel: str) -> Axes:
    """Axes with two spines and faint horizontal grid lines."""
    ax = figure.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(SOFT)
    ax.grid(axis="y", color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=12, length=4, color=SOFT)
    ax.set_xlabel(xlabel, fontsize=13, color=INK, labelpad=8)
    ax.set_ylabel(ylabel, fontsize=13, color=INK, labelpad=8)
    return ax


def spread_labels(wanted: list[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Positions nearest to `wanted` (least squares) with at least `gap` between any two, in [low, high]; order is kept.

    Isotonic regression by pool adjacent violators: crowded labels form a block around their mean. Clipping to the
    bounds gives the least squares solution under bounds. If not all labels fit between the bounds, the gap is reduced.
    """
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[float]] = []  # [mean of (wanted - rank * gap), members]
    for rank, i in enumerate(order):
        blocks.append([wanted[i] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, many), (other, more) = blocks[-2:]
            blocks[-2:] = [[(mean * many + other * more) / (many + more), many + more]]
    top = high - gap * (len(wanted) - 1)
    flat = [min(max(mean, low), top) for mean, many in blocks for _ in range(int(many))]
    places = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        places[i] = flat[rank] + rank * gap
    return places


def to_svg(figure: Figure) -> str:
    """The figure as an <svg> element for an HTML page, with reproducible bytes."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "evocomp", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write an optimized PNG, replacing an older one atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", facecolor=figure.get_facecolor(), pil_kwargs={"optimize": True})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
