import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from scipy.optimize import isotonic_regression, minimize

from evocomp.viz import (
    retention_curve,
    search_trace,
    to_svg,
)
from evocomp.viz.style import ACCENT, spread_labels


def row(method, kept, accuracy, group="needs nothing from the LLM", full=0.8, **rest):
    numbers = {
        "accuracy": accuracy,
        "low": accuracy - 0.02,
        "high": accuracy + 0.02,
        "relative": accuracy / full,
    }
    return {"method": method, "kept": kept, "group": group, "needs_llm": False} | numbers | rest


ROWS = [
    row("full", 64, 0.8, "reference and floors"),
    row("no_image", 0, 0.2, "reference and floors"),
    row("random", 4, 0.3, "reference and floors"),
    row("random", 16, 0.5, "reference and floors"),
    row("evocomp", 4, 0.72),
    row("evocomp", 16, 0.76),
    row("FastV", 4, 0.7, "ran the LLM on all tokens first", needs_llm=True),
    row("FastV", 16, 0.74, "ran the LLM on all tokens first", needs_llm=True),
    {"method": "HiRED", "kept": 16, "accuracy": None, "relative": None, "group": ""},
]


def test_retention_curve_draws_percent_of_uncompressed():
    ax = retention_curve(ROWS).axes[0]
    curves = [line for line in ax.lines if tuple(line.get_xdata()) == (16, 4)]
    assert {tuple(np.round(line.get_ydata(), 6)) for line in curves} == {(62.5, 37.5), (95, 90), (92.5, 87.5)}
    ours = next(line for line in curves if line.get_color() == ACCENT)
    assert tuple(np.round(ours.get_ydata(), 6)) == (95, 90) and ours.get_linestyle() == "-"
    assert [line.get_linestyle() for line in curves].count("--") == 1
    levels = [round(line.get_ydata()[0], 6) for line in ax.lines if line.get_linestyle() == ":"]
    assert sorted(levels) == [25, 100]
    names = {text.get_text() for text in ax.texts}
    assert names == {"uncompressed", "no image", "random tokens", "EvoComp", "FastV"}
    band = next(c for c in ax.collections if isinstance(c, PolyCollection)).get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((100 * 0.70 / 0.8, 100 * 0.78 / 0.8))
    assert ax.get_xlim()[0] > ax.get_xlim()[1]  # fewer tokens to the right


def test_retention_curve_with_one_budget_and_with_none():
    rows = [r for r in ROWS if r["kept"] != 4]
    ax = retention_curve(rows).axes[0]
    assert sorted(round(line.get_ydata()[0], 3) for line in ax.lines if len(line.get_xdata()) == 1) == [
        62.5,
        92.5,
        95,
    ]
    with pytest.raises(ValueError, match="nothing to draw"):
        retention_curve(ROWS[:2])


@pytest.mark.parametrize("methods", [1, 9, 40])
def test_nothing_is_clipped_and_every_name_is_beside_the_axes(methods):
    """Few questions give intervals far above 100 %; a full panel has more names than fit into a small figure."""
    rows = [row("full", 64, 0.8, "references")]
    rows += [row(f"m{i}", kept, 0.7, high=1.0, low=0.1) for i in range(methods) for kept in (16, 4)]
    figure = retention_curve(rows)
    (ax,) = figure.axes
    assert ax.get_ylim()[0] <= 12.5 and ax.get_ylim()[1] >= 125
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = sorted((text.get_window_extent(renderer) for text in ax.texts), key=lambda box: box.y0)
    frame, half = ax.get_window_extent(renderer), max(box.height for box in boxes) / 2
    for box in boxes:
        assert frame.y0 - half <= box.y0 and box.y1 <= frame.y1 + half + 1 and box.x1 <= figure.bbox.x1
    for below, above in zip(boxes, boxes[1:], strict=False):
        assert above.y0 >= below.y0 + 0.8 * below.height


def test_search_trace_shows_medians():
    traces = np.random.default_rng(0).random((9, 5, 3)) + 0.1
    ax = search_trace(traces).axes[0]
    drawn = [tuple(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 5]
    assert set(drawn) == {tuple(np.median(traces[:, :, column], axis=0)) for column in range(3)}
    assert ax.get_yscale() == "log"
    assert search_trace(traces - traces.min()).axes[0].get_yscale() == "linear"


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=14), st.floats(0.01, 0.3))
def test_labels_are_spread_as_least_squares_would(wanted, gap):
    places = spread_labels(wanted, gap)
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(wanted))
    best = isotonic_regression(np.array(wanted)[order] - steps).x + steps
    np.testing.assert_allclose(np.array(places)[order], best, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=14), st.floats(0.01, 0.3))
def test_labels_stay_between_bounds_as_least_squares_would(wanted, gap):
    places = np.array(spread_labels(wanted, gap, 0.0, 1.0))
    assert places.min() >= -1e-9 and places.max() <= 1 + 1e-9
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(places[order]) >= gap - 1e-9).all()
    steps = gap * np.arange(len(wanted))
    bounds = [(0, 1 - steps[-1])] * len(wanted)
    target = np.array(wanted)[order] - steps
    found = places[order] - steps
    best = minimize(
        lambda u: ((u - target) ** 2).sum(),
        np.full(len(wanted), bounds[0][1] / 2),
        jac=lambda u: 2 * (u - target),
        bounds=bounds,
        constraints=[{"type": "ineq", "fun": np.diff}] if len(wanted) > 1 else [],
        method="SLSQP",
    )
    assert ((found - target) ** 2).sum() <= best.fun + 1e-6


def test_svg_is_the_same_every_time_and_well_formed():
    first = to_svg(retention_curve(ROWS))
    assert first == to_svg(retention_curve(ROWS))
    assert ElementTree.fromstring(first).tag.endswith("svg")


def test_the_users_matplotlib_settings_are_unchanged():
    before = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
    to_svg(search_trace(np.ones((2, 3, 3))))
    assert {key: matplotlib.rcParams[key] for key in before} == before
    # choosing a backend imports pyplot
    code = """import sys, numpy as np
from evocomp.viz import search_trace, to_svg
to_svg(search_trace(np.ones((2, 3, 3))))
print({"torch", "matplotlib.pyplot"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
