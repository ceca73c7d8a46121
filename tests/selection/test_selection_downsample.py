import pytest
from hypothesis import given
from hypothesis import strategies as st

from evocomp.selection.downsample import downsample, downsampled_grid


@pytest.mark.parametrize(
    "grid,keep,size",
    [
        ((24, 24), 64, (112, 112)),
        ((24, 24), 144, (168, 168)),
        ((24, 24), 128, (154, 154)),
        ((24, 24), 192, (182, 182)),
        ((12, 24), 72, (84, 168)),
        ((24, 12), 72, (168, 84)),
    ],
)
def test_pixels_for_a_budget(grid, keep, size):
    plan = downsample(grid, keep, patch=14)
    assert plan.size == size
    assert plan.count <= keep


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), data=st.data())
def test_never_more_tokens_than_asked_and_no_larger_image(rows, columns, data):
    keep = data.draw(st.integers(1, rows * columns))
    a, b = downsampled_grid((rows, columns), keep)
    assert 1 <= a <= rows and 1 <= b <= columns and a * b <= keep
    # the grid keeps the image's aspect ratio, rounded to the nearest token
    assert abs(a - max(1, b * rows / columns)) <= 0.5 or abs(b - max(1, a * columns / rows)) <= 0.5
