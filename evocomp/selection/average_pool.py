"""Average pooling of the token grid."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evocomp.selection.base import NotApplicable, Selection, SelectionInputs, Selector
from evocomp.selection.downsample import distortion

# the usual grid for 128 tokens, 8 x 16, changes the aspect ratio of a square by exactly two
LARGEST_DISTORTION = 2.0


def pooled_grid(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """The largest grid of at most `keep` cells whose aspect ratio is within a factor of two of that of `grid`.

    Ties go to the smaller change of the aspect ratio, then to fewer rows: 24 x 24 gives 12 x 16, 8 x 16 and 8 x 8 for
    192, 128 and 64. If no grid is within a factor of two, the one with the smallest change is taken.
    """
    rows, columns = grid
    fits = [(a, b) for a in range(1, min(rows, keep) + 1) for b in range(1, min(columns, keep // a) + 1)]
    limit = max(LARGEST_DISTORTION, min(distortion(grid, pair) for pair in fits)) + 1e-9
    allowed = [pair for pair in fits if distortion(grid, pair) <= limit]
    return max(allowed, key=lambda pair: (pair[0] * pair[1], -distortion(grid, pair), -pair[0]))


def average_pool(tokens: Tensor, grid: tuple[int, int], out_grid: tuple[int, int]) -> Tensor:
    """Means [a * b, D] over the windows of `out_grid` (a, b) on row-major tokens [N, D] of `grid`.

    Windows overlap if a side of `grid` is not divisible (adaptive pooling of torch).
    """
    planes = tokens.float().T.unflatten(1, grid)
    return F.adaptive_avg_pool2d(planes, out_grid).flatten(1).T.to(tokens.dtype)


def _middles(size: int, windows: int, device: torch.device) -> Tensor:
    i = torch.arange(windows, device=device)
    return (i * size // windows + ((i + 1) * size + windows - 1) // windows - 1) // 2


@dataclass(frozen=True)
class AveragePool(Selector):
    """Average pooling to at most `keep` tokens. The position of a token is the middle of its window."""

    name = "average_pool"
    merges = True

    out_grid: tuple[int, int] | None = None
    """(rows, columns) of the result, independent of the budget; None: see `pooled_grid`."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        rows, columns = inputs.grid
        if rows * columns != len(inputs):
            raise NotApplicable(self.name, "grid")
        out = self.out_grid or pooled_grid(inputs.grid, keep)
        down, across = (_middles(s, w, inputs.tokens.device) for s, w in zip(inputs.grid, out, strict=True))
        positions = (down[:, None] * columns + across).flatten()
        return Selection(positions, tokens=average_pool(inputs.tokens, inputs.grid, out), extra={"grid": out})
