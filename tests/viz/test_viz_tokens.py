import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from evocomp.viz import SheetItem, groups_over_image, kept_sheet, kept_tokens, light_up
from evocomp.viz import sheet as sheet_module
from evocomp.viz.sheet import wrap
from evocomp.viz.tokens import borders, patch_of_pixel, wash_groups


def test_light_up_pixel_by_pixel():
    image = np.array(
        [
            [[200, 100, 40], [8, 4, 0], [255, 255, 255]],
            [[100, 100, 100], [12, 16, 20], [40, 80, 120]],
        ],
        dtype=np.uint8,
    )
    lit = light_up(image, [0, 5], (2, 3), dim=0.25)
    expected = [
        [[200, 100, 40], [2, 1, 0], [64, 64, 64]],
        [[25, 25, 25], [3, 4, 5], [40, 80, 120]],
    ]
    np.testing.assert_array_equal(lit, expected)
    assert lit.dtype == np.uint8


def test_light_up_covers_full_patches_and_does_not_change_the_image():
    image = np.random.default_rng(0).integers(0, 256, (96, 48, 3), dtype=np.uint8)
    before = image.copy()
    lit = light_up(image, np.array([0, 17]), (12, 6), dim=0.0)
    expected = np.zeros_like(image)
    expected[:8, :8] = image[:8, :8]
    expected[16:24, 40:48] = image[16:24, 40:48]  # token 17 = row 2, column 5
    np.testing.assert_array_equal(lit, expected)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(light_up(image, range(72), (12, 6)), image)
    np.testing.assert_array_equal(light_up(image, [], (12, 6), dim=0.5), np.rint(image * 0.5))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9), st.integers(0, 9))
def test_pixels_fall_to_tokens_evenly_even_if_the_grid_does_not_divide_them(rows, columns, more, wider):
    height, width = rows + more, columns + wider
    owner = patch_of_pixel((height, width, 3), (rows, columns))
    for y in range(height):
        for x in range(width):
            assert owner[y, x] == int(rows * y / height) * columns + int(columns * x / width)
    sizes = np.bincount(owner.ravel(), minlength=rows * columns)
    assert sizes.min() >= (height // rows) * (width // columns)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_borders_lie_between_tokens_that_differ(seed, rows, columns, mask):
    cells = np.random.default_rng(seed).integers(0, 2 if mask else 4, (rows, columns))
    outside = 0 if cells.max() < 2 else -1

    def at(r, c):
        return cells[r, c] if 0 <= r < rows and 0 <= c < columns else outside

    expected = set()
    for r in range(rows + 1):
        for c in range(columns + 1):
            if r < rows and at(r, c) != at(r, c - 1):
                expected.add((10 * c, 5 * r, 10 * c, 5 * r + 5))
            if c < columns and at(r, c) != at(r - 1, c):
                expected.add((10 * c, 5 * r, 10 * c + 10, 5 * r))
    segments = borders(cells, (5 * rows, 10 * columns, 3))
    assert {tuple(segment.ravel().tolist()) for segment in segments} == expected
    assert len(segments) == len(expected)


def test_wash_is_one_tint_per_group_and_preserves_brightness():
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[:2] = 200
    washed = wash_groups(image, np.array([7, 7, 9, 9]), (2, 2)).astype(int)
    assert len(np.unique(washed[:2].reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(washed.reshape(-1, 3), axis=0)) == 2
    same = wash_groups(image, np.array([7, 7, 7, 7]), (2, 2)).astype(int)
    np.testing.assert_array_equal(same[0, 0] - same[3, 3], [100, 100, 100])


def test_group_words_are_written_on_their_own_groups():
    groups = np.array([[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 2], [3, 3, 3, 3]])
    figure = groups_over_image(np.zeros((40, 80, 3), np.uint8), groups, (4, 4), ["zero", "one", "two", "three"])
    texts = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert set(texts) == {"zero", "three"}  # of three tokens or more
    assert texts["zero"] == (30, 15)  # the token with four neighbours of its group: row 1, column 1
    assert groups[int(texts["three"][1] // 10), int(texts["three"][0] // 20)] == 3


def test_kept_tokens_draws_on_the_axes_it_is_given():
    image = np.full((8, 8, 3), 100, np.uint8)
    figure = kept_tokens(image, [3], (2, 2))
    ax = figure.add_axes((0, 0, 0.1, 0.1))
    assert kept_tokens(image, [0], (2, 2), ax) is figure
    np.testing.assert_array_equal(ax.images[0].get_array(), light_up(image, [0], (2, 2)))
    assert len(ax.collections[0].get_segments()) == 4


@pytest.mark.parametrize("count, columns", [(1, 4), (5, 4), (3, 2)])
def test_sheet_shows_every_image_with_its_kept_tokens(tmp_path, count, columns):
    tones = [(200 - 10 * i, 100, 48) for i in range(count)]
    items = [
        SheetItem(np.full((16, 16, 3), tone, np.uint8), [i % 4], (2, 2), "color of $circle", "red", "blue", "red")
        for i, tone in enumerate(tones)
    ]
    path = kept_sheet(items, tmp_path / "kept.png", columns)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.png"]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    for tone in tones:
        lit = (pixels == tone).all(axis=2)
        dimmed = (pixels == np.rint(np.array(tone) * 0.25)).all(axis=2)
        # one token in four is highlighted, except for a few pixels of the white outline
        assert dimmed.sum() / lit.sum() == pytest.approx(3, rel=0.06)
    assert lit.sum() > 150**2


def test_long_words_do_not_break_the_sheet(tmp_path):
    item = SheetItem(np.zeros((8, 8, 3), np.uint8), [0], (1, 1), "why " * 60, "because " * 30, "$x_1$ 50% \\n")
    assert Image.open(kept_sheet([item], tmp_path / "a.png")).size[0] > 400


SHAPES = [(8, 8), (4, 40), (40, 4), (9, 16)]
QUESTIONS = [
    "short",
    "W" * 90,
    "What is written on the sign to the left of the second door? " * 4,
    "\u00e4\u00f6\u00fc " * 40,
    "",
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_captions_neither_overlap_nor_leave_the_sheet(shape, question, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sheet_module, "save_png", lambda figure, path: drawn.append(figure))
    items = [
        SheetItem(np.zeros((*size, 3), np.uint8), [0], (1, 2), question, "yes " * i, "no", "no", context=[1])
        for i, size in enumerate([shape, *SHAPES])
    ]
    kept_sheet(items, tmp_path / "a.png", columns=2)
    (figure,) = drawn
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    boxes += [ax.get_window_extent(renderer) for ax in figure.axes]
    for i, one in enumerate(boxes):
        assert one.x0 >= 0 and one.y0 >= 0 and one.x1 <= figure.bbox.x1 and one.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            wide = min(one.x1, other.x1) - max(one.x0, other.x0)
            high = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert wide <= 0.5 or high <= 0.5, "two boxes overlap by more than rounding"
    assert {"2 kept (1 + 1 context): \u2713 no"} <= {text.get_text() for text in figure.texts}


@settings(max_examples=40, deadline=None)
@given(st.text("abW \n$_", max_size=300), st.integers(1, 4))
def test_wrapped_lines_fit_and_lose_nothing_but_the_end(text, most):
    lines = wrap(text, "bold", most)
    assert 1 <= len(lines) <= most and all(sheet_module._inches(line, "bold") <= sheet_module._WIDTH for line in lines)
    whole = "".join(text.split())
    shown = "".join("".join(lines).split())
    assert shown == whole or (shown.endswith("\u2026") and whole.startswith(shown[:-1]) and len(lines) == most)


def test_context_tokens_are_between_kept_and_dimmed():
    image = np.full((4, 4, 3), 200, np.uint8)
    lit = light_up(image, [0], (2, 2), dim=0.2, context=[3, 0])
    np.testing.assert_array_equal(lit[::2, ::2, 0], [[200, 40], [40, 120]])
    figure = kept_tokens(image, [0], (2, 2), context=[3])
    assert len(figure.axes[0].collections) == 2
