"""Charts: accuracy against kept tokens and against time, from the rows of a report; loss during a search."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from evocomp.viz.names import display_name
from evocomp.viz.style import (
    ACCENT,
    COLORS,
    FAINT,
    INK,
    MARKERS,
    PAPER,
    SOFT,
    new_figure,
    plain_axes,
    spread_labels,
)

Row = dict[str, Any]
_NAME_HEIGHT = 0.25  # inches from one name at the right edge to the next
_GREYS = ("#9aa1b2", "#6b7285", "#b9bfcc", "#4a5266")
_READING = "band and bars: 95 % intervals; dashed: the LLM processes more tokens than are kept"


def retention_curve(rows: Sequence[Row], ours: str = "evocomp") -> Figure:
    """Accuracy as a percentage of the uncompressed accuracy against kept tokens, with intervals.

    References (uncompressed, no image) are horizontal lines; selectors whose LLM processes more tokens than are kept
    are dashed. Rows are those of report.json; rows without an accuracy are ignored.

    Raises:
        ValueError: no selector has an accuracy at a kept count.
    """
    curves, levels = _curves(rows)
    names = len(curves) + len(levels)
    height = max(5.6, names * _NAME_HEIGHT / 0.84)  # 0.84 of the figure's height are axes
    figure = new_figure(9.6, height)
    ax = plain_axes(figure, "visual tokens kept", "accuracy, % of uncompressed")
    budgets = sorted({row["kept"] for found in curves.values() for row in found}, reverse=True)
    ends, looks = [], _looks(curves, ours)
    for method, found in curves.items():
        color, marker = looks[method]
        x = np.array([row["kept"] for row in found])
        y, low, high = (np.array([_relative(row, name) for row in found]) for name in ("accuracy", "low", "high"))
        mine = method == ours
        if mine:
            ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0, zorder=4)
        else:
            ax.vlines(x, low, high, color=color, linewidth=1, alpha=0.55, zorder=2)
        ax.plot(
            x,
            y,
            color=color,
            marker=marker,
            markersize=8 if mine else 6,
            linewidth=3.2 if mine else 1.6,
            linestyle=(0, (4, 2)) if found[0].get("needs_llm") else "-",
            markeredgecolor=PAPER,
            zorder=5 if mine else 3,
        )
        ends.append((method, float(y[-1]), color, mine))
    for method, level in levels.items():
        ax.axhline(level, color=SOFT, linewidth=1.2, linestyle=":", zorder=1)
        ends.append((method, level, SOFT, False))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(budgets))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlim(budgets[0] * 1.12, budgets[-1] / 1.08)
    ends_of_bars = [_relative(row, end) for found in curves.values() for row in found for end in ("low", "high")]
    ends_of_bars += levels.values()
    ax.set_ylim(max(0, min(ends_of_bars) - 5), max(100, *ends_of_bars) + 4)
    ax.xaxis.set_label_coords(0, -0.12 * 5.6 / height)
    ax.xaxis.label.set(ha="left", va="center")
    figure.text(0.985, 0.025 * 5.6 / height, _READING, ha="right", va="center", fontsize=10.5, color=SOFT)
    figure.subplots_adjust(left=0.09, right=0.7, top=0.97, bottom=0.13 * 5.6 / height)
    _name_ends(ax, ends, _NAME_HEIGHT)
    return figure


def search_trace(traces: np.ndarray, xlabel: str = "generation") -> Figure:
    """Answer loss during a search. traces: [runs, rounds, 3], lowest, mean and best-so-far loss in nats.

    Lines are medians over the runs, bands are interquartile ranges.
    """
    traces = np.asarray(traces, dtype=float)
    assert traces.ndim == 3 and traces.shape[2] == 3, "traces [runs, rounds, 3]"
    figure = new_figure(7.6, 4.8)
    ax = plain_axes(figure, xlabel, "answer loss")
    generations = np.arange(traces.shape[1])
    ends = []
    for column, name, color, line in (
        (1, "mean", COLORS[0], "-"),
        (0, "lowest", COLORS[1], (0, (3, 2))),
        (2, "best so far", ACCENT, "-"),
    ):
        low, middle, high = np.quantile(traces[:, :, column], (0.25, 0.5, 0.75), axis=0)
        if name != "lowest":  # its band would cover that of `best so far`
            ax.fill_between(generations, low, high, color=color, alpha=0.14, linewidth=0)
        ax.plot(generations, middle, color=color, linewidth=3 if name == "best so far" else 1.8, linestyle=line)
        ends.append((name, float(middle[-1]), color, name == "best so far"))
    if traces.min() > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlim(0, max(1, traces.shape[1] - 1))
    figure.subplots_adjust(left=0.13, right=0.81, top=0.96, bottom=0.15)
    _name_ends(ax, ends, _NAME_HEIGHT)
    return figure


def _curves(rows: Sequence[Row]) -> tuple[dict[str, list[Row]], dict[str, float]]:
    """Rows per selector, most tokens first, and the level of each reference, which has a single token count."""
    rows = [row for row in rows if row["accuracy"] is not None and row["relative"] is not None]
    budgets = {row["kept"] for row in rows if not _is_reference(row)}
    methods: dict[str, list[Row]] = {}
    levels: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: -row["kept"]):
        if row["kept"] in budgets:
            methods.setdefault(row["method"], []).append(row)
        else:
            levels[row["method"]] = 100 * row["relative"]
    if not methods:
        raise ValueError("no selector has an accuracy at a kept count: nothing to draw")
    in_order = dict.fromkeys(row["method"] for row in rows if row["method"] in methods)
    return {method: methods[method] for method in in_order}, levels


def _is_reference(row: Row) -> bool:
    return row.get("group", "").startswith("reference")


def _relative(row: Row, name: str) -> float:
    """`name` (accuracy, low, high) in percent of the uncompressed accuracy."""
    whole = row["accuracy"] / row["relative"] if row["relative"] else 1.0
    return 100 * row[name] / whole


def _looks(methods: dict[str, list[Row]], ours: str) -> dict[str, tuple[str, str]]:
    """Colour and marker of each selector: grey for references, a sequence of colours for the others."""
    looks, greys, colors = {ours: (ACCENT, MARKERS[0])}, 0, 0
    for method, found in methods.items():
        if method == ours:
            continue
        if _is_reference(found[0]):
            looks[method] = (_GREYS[greys % len(_GREYS)], MARKERS[-1 - greys % 4])
            greys += 1
        else:
            looks[method] = (COLORS[colors % len(COLORS)], MARKERS[1 + colors % 6])
            colors += 1
    return looks


def _name_ends(ax: Axes, ends: list[tuple[str, float, str, bool]], gap: float) -> None:
    """Write names at the right ends of the lines, moved to be at least `gap` inches apart."""
    gap = gap / (ax.get_position().height * ax.get_figure().get_figheight())
    to_axes = ax.transData + ax.transAxes.inverted()
    x = ax.get_xlim()[1]
    wanted = [float(to_axes.transform((x, y))[1]) for _, y, _, _ in ends]
    for (name, _, color, strong), at, label in zip(ends, wanted, spread_labels(wanted, gap, 0.0, 1.0), strict=True):
        ax.plot([1.0, 1.03], [at, label], transform=ax.transAxes, color=FAINT, linewidth=1, clip_on=False)
        ax.text(
            1.035,
            label,
            display_name(name),
            transform=ax.transAxes,
            parse_math=False,
            va="center",
            fontsize=13 if strong else 12,
            weight="bold" if strong else "normal",
            color=INK if color in (SOFT, *_GREYS) else color,
        )
