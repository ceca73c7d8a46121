"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388; code 42Shawn/LLaVA-PruMerge)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.similarity import cosine
from evocomp.selection.top_r import descending
from evocomp.selection.uniform_stride import uniform_stride

NEIGHBOURS = 32


def class_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention of CLS (row 0) to the patches [N], from [N+1, C] projections treated as ONE head.

    The softmax is over all N+1 keys with scale C^-0.5; then the CLS column is dropped.
    """
    scores = keys.float() @ queries[0].float() / keys.shape[1] ** 0.5
    return scores.softmax(0)[1:]


def outlier_ratio(attention: Tensor) -> float:
    """Fraction of patches whose attention [N] exceeds the third quartile by more than 1.5 interquartile ranges."""
    attention = attention.double()
    low, high = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    return int((attention > high + 1.5 * (high - low)).sum()) / len(attention)


def plus_centres(attention: Tensor, ratio: float, adaptive: bool = True) -> Tensor:
    """PruMerge+ centres [K] as published: the top int(N * ratio) by attention [N], then patches of a regular grid.

    Adaptive (`if_adaptive=True` in the authors' code, `ratio` from `outlier_ratio`): the grid starts at 0, has stride
    int(int(1 / ratio) / 3) and ends before N - 1; patches that are centres already are omitted. Not adaptive
    (`if_adaptive=False`, `ratio` given): the grid starts at int(step / 2) with stride step = int(1 / ratio); patches
    that are centres already are repeated. In cases where the original fails, this function uses stride 1 (ratio above
    1/3), the stride of a single outlier (ratio 0), or a grid of another length than the top.
    """
    n = len(attention)
    top = descending(attention)[: int(n * ratio)]
    step = max(1, int(1 / ratio)) if ratio > 0 else n
    start, stride = (0, max(1, step // 3)) if adaptive else (step // 2, step)
    grid = torch.arange(start, max(n - 1, start + 1), stride, device=attention.device)
    return torch.cat([top, grid[~torch.isin(grid, top)] if adaptive else grid])


def plus_centres_exact(attention: Tensor, count: int) -> Tensor:
    """`count` distinct centres for a fixed budget: a quarter by attention, the rest evenly spaced over other patches.

    This division is our choice; the adaptive rule aims at three grid patches per outlier.
    """
    top = descending(attention)[: -(-count // 4)]
    free = torch.ones_like(attention, dtype=torch.bool).index_fill(0, top, False).nonzero()[:, 0]
    return torch.cat([top, free[uniform_stride(len(free), count - len(top), free.device)]])


def merge(features: Tensor, keys: Tensor, attention: Tensor, centres: Tensor) -> Tensor:
    """Merged rows [K+1, C]: one per centre and one for the other patches, from patch features and keys [N, C].

    To each centre are added its 32 nearest neighbours by cosine of keys (fewer if the pool is smaller), each times its
    attention [N], without normalisation. The pool contains the other centres and all patches that are not centres. The
    last row is the sum of the patches that are not centres, each times its attention.

    Repeated centres (PruMerge+ with `if_adaptive=False`) are treated as in the authors' code: each has the other copy
    in its pool, and as many of the first patches that are not centres are in no pool and not in the last row.

    Args:
        features: [N, C].
        keys: [N, C].
        attention: attention of CLS to the patches [N].
        centres: patch indices [K], may contain duplicates.
    """
    x, n, count = features.float(), len(features), len(centres)
    free = torch.ones(n, dtype=torch.bool, device=x.device).index_fill(0, centres, False)
    repeated = count - int((~free).sum())
    rest = free.nonzero()[repeated:, 0]
    pool = torch.cat([centres, rest])
    nearness = cosine(keys[centres], keys[pool])
    nearness[:, :count].fill_diagonal_(-torch.inf)
    near = descending(nearness)[:, : min(NEIGHBOURS, len(pool) - 1)]
    weights = torch.zeros_like(nearness).scatter(1, near, attention.float()[pool[near]])
    rows = torch.cat([x[centres] + weights @ x[pool], (attention.float()[rest] @ x[rest])[None]])
    return rows.to(features.dtype)


@dataclass(frozen=True)
class PruMerge(Selector):
    """Outliers of CLS attention, each merged with its neighbours, and one row for all other patches.

    The `keep` rows are `keep` - 1 centres and the extra row. Positions are not ascending: centres are in order of
    descending attention; the extra row comes last, at position N - 1. The published code uses queries and keys of the
    CLIP layer AFTER the one that the projector uses (`clip_next_*`). A truncated tower has no such layer; then those of
    the projector's layer are used and extra["layer"] is "used" instead of "next".
    """

    name = "prumerge"
    merges = True
    needs = frozenset({"clip_hidden", "clip_keys", "clip_queries", "project"})
    source = "arXiv 2403.15388, github.com/42Shawn/LLaVA-PruMerge"

    adaptive: bool = False
    """Whether the number of rows depends on the image, as is the authors' default; `keep` is then ignored. Otherwise
    there are `keep` - 1 centres, as in their code with `if_adaptive=False` and `reduction_ratio` = (`keep` - 1) / N."""

    def centres(self, attention: Tensor, keep: int) -> Tensor:
        """Patch indices of the centres [K] in output order."""
        count = int(len(attention) * outlier_ratio(attention)) if self.adaptive else keep - 1
        return descending(attention)[:count]

    def missing(self, inputs: SelectionInputs) -> set[str]:
        has_next = inputs.clip_next_keys is not None and inputs.clip_next_queries is not None
        return super().missing(inputs) - ({"clip_keys", "clip_queries"} if has_next else set())

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        queries, keys, layer = inputs.clip_next_queries, inputs.clip_next_keys, "next"
        if queries is None or keys is None:
            queries, keys, layer = inputs.clip_queries, inputs.clip_keys, "used"
        attention = class_attention(queries, keys)
        centres = self.centres(attention, keep)
        rows = merge(inputs.clip_hidden[1:], keys[1:], attention, centres)
        positions = torch.cat([centres, centres.new_tensor([len(attention) - 1])])
        return Selection(positions, tokens=inputs.project(rows), extra={"centres": centres, "layer": layer})


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with additional evenly spaced centres: centres by attention, then by grid, then the extra row.

    If adaptive, it follows the authors' code (`plus_centres`). For a fixed budget, the division into attention and grid
    is ours (`plus_centres_exact`), because the authors' rule repeats patches and is defined for few budgets only.
    """

    name = "prumerge_plus"

    def centres(self, attention: Tensor, keep: int) -> Tensor:
        if self.adaptive:
            return plus_centres(attention, outlier_ratio(attention))
        return plus_centres_exact(attention, keep - 1)
