import pytest
import torch

from evocomp.selection.average_pool import AveragePool, average_pool, pooled_grid
from evocomp.selection.base import NotApplicable


@pytest.mark.parametrize("case", [0, 1])
def test_published(case, cases, expected, arrays, inputs144):
    want = cases("avgpool")[case]
    out = tuple(want["out_grid(rows,cols)"])
    truth = expected["avgpool/" + want["array"]]
    assert torch.allclose(average_pool(arrays["tokens"], (12, 12), out), truth, atol=1e-4, rtol=0)
    selection = AveragePool(out_grid=out)(inputs144, 144)
    assert torch.allclose(selection.tokens, truth, atol=1e-4, rtol=0)


def test_windows_by_hand(drawn):
    inputs = drawn(0, 6, grid=(2, 3))
    out = AveragePool(out_grid=(1, 2))(inputs, 2)  # columns 0-1 and 1-2: windows overlap
    x = inputs.tokens.double()
    want = torch.stack([x[[0, 1, 3, 4]].mean(0), x[[1, 2, 4, 5]].mean(0)])
    assert torch.allclose(out.tokens.double(), want, atol=1e-6)
    assert out.positions.tolist() == [0, 1]


@pytest.mark.parametrize(
    "grid,keep,out",
    [
        ((24, 24), 192, (12, 16)),
        ((24, 24), 128, (8, 16)),
        ((24, 24), 64, (8, 8)),
        ((24, 24), 144, (12, 12)),
        ((24, 24), 37, (6, 6)),
        ((24, 24), 3, (1, 2)),
        ((24, 24), 1, (1, 1)),
        ((1, 576), 64, (1, 64)),
        ((24, 24), 576, (24, 24)),
        ((2, 3), 5, (2, 2)),
    ],
)
def test_grid_for_a_budget(grid, keep, out):
    assert pooled_grid(grid, keep) == out


def test_positions_are_middles_of_windows(drawn):
    assert AveragePool()(drawn(0, 36, grid=(6, 6)), 4).positions.tolist() == [7, 10, 25, 28]
    assert AveragePool()(drawn(0, 36, grid=(6, 6)), 36).positions.tolist() == list(range(36))


def test_a_sequence_that_is_no_grid_is_not_applicable(drawn):
    with pytest.raises(NotApplicable, match="grid"):
        AveragePool()(drawn(0, 13, grid=(3, 4)), 4)
