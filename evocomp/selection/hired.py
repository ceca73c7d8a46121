"""HiRED: a token budget divided among image partitions by CLS attention (arXiv 2408.10945)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evocomp.log import UserError
from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.top_r import top_r

Regions = Literal["stripes", "quadrants"]


def region_of(grid: tuple[int, int], sub_grid: tuple[int, int], regions: Regions = "stripes") -> Tensor:
    """Index of the sub-image [n] to which each of the n = rows * columns patches of the full image is assigned.

    "stripes": consecutive runs of the flattened patches, as in the published code.
    "quadrants": the sub-image that shows the patch, as described in the paper.
    """
    (rows, columns), (sub_rows, sub_columns) = grid, sub_grid
    patch = torch.arange(rows * columns)
    if regions == "stripes":
        return patch * (sub_rows * sub_columns) // (rows * columns)
    return (patch // columns * sub_rows // rows) * sub_columns + patch % columns * sub_columns // columns


def hired_budgets(first: Tensor, region: Tensor, count: int, total: int, alpha: float = 0.5) -> list[int]:
    """Token budget of each of `count` sub-images, out of `total`.

    first [n]: layer-0 CLS attention of the full image, summed over heads; region [n]: see `region_of`. The budget of a
    sub-image is proportional to the number of the full image's top int(n * (1 - alpha)) patches in its region. It is
    truncated in float32 as published, so that the sum may be a few tokens below `total`.
    """
    n = len(first)
    top = top_r(first.float(), int(n * (1 - alpha)))
    hits = torch.bincount(region.to(top.device)[top], minlength=count).float()
    share = hits / hits.sum().clamp(min=1) * total
    return [min(int(budget), n) for budget in share.tolist()]


def hired_next(last: Tensor, first: Tensor, total: int, region: Tensor, alpha: float = 0.5) -> list[Tensor]:
    """Ascending indices of the kept tokens of each partition; the full image is partition 0.

    last [P, n]: CLS attention of the layer that the projector uses, summed over heads; first [n] and region [n] as in
    `hired_budgets`. The full image keeps min(int(total * alpha), n) tokens; the sub-images share the rest. The
    published total for a rate is int(P * n * rate).
    """
    full = min(int(total * alpha), last.shape[1])
    budgets = [full, *hired_budgets(first, region, len(last) - 1, total - full, alpha)]
    return [top_r(scores.float(), budget) for scores, budget in zip(last, budgets, strict=True)]


@dataclass(frozen=True)
class HiRED(Selector):
    """HiRED on a single image (LLaVA-1.5): the top tokens by CLS attention summed over heads.

    The published budget for a rate is int(N * rate): 115 of 576 at 0.2.
    """

    name = "hired"
    needs = frozenset({"cls_attention"})
    source = "arXiv 2408.10945, github.com/hasanar1f/HiRED"

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        return Selection.of(top_r(inputs.cls_attention.float().sum(0), keep))


@dataclass(frozen=True)
class HiREDNext(Selector):
    """HiRED on LLaVA-NeXT: N = P * n tokens, first n of the full image, then n of each sub-image, without newlines.

    It keeps `keep` tokens or a few less (truncation as published); extra["budgets"] lists the tokens per partition.
    """

    name = "hired_next"
    needs = frozenset({"cls_attention", "cls_attention_first"})
    source = HiRED.source

    sub_grid: tuple[int, int] = (2, 2)
    """(rows, columns) of sub-images."""
    alpha: float = 0.5
    """Fraction of the budget for the full image."""
    regions: Regions = "stripes"
    """Assignment of the full image's patches to sub-images, see `region_of`."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        partitions = 1 + self.sub_grid[0] * self.sub_grid[1]
        rows, columns = inputs.grid
        if rows % partitions or rows * columns != len(inputs):
            raise UserError(
                f"hired_next: a grid of {rows} x {columns} with {len(inputs)} tokens is not {partitions} "
                f"stacked partitions; set sub_grid to the (rows, columns) of sub-images, and remove newline tokens."
            )
        n = len(inputs) // partitions
        region = region_of((rows // partitions, columns), self.sub_grid, self.regions)
        last = inputs.cls_attention.float().sum(0).unflatten(0, (partitions, n))
        first = inputs.cls_attention_first.float().sum(0)[:n]
        kept = hired_next(last, first, keep, region, self.alpha)
        indices = torch.cat([part + i * n for i, part in enumerate(kept)])
        return Selection.of(indices, budgets=[len(part) for part in kept])
