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
    """Attention of CLS (row 0) on the patches [N], from [N+1, C] projections taken as ONE head.

    Softmax over all N+1 keys at scale C^-0.5, then the CLS column is dropped.
    """
    scores = keys.float() @ queries[0].float() / keys.shape[1] ** 0.5
    return scores.softmax(0)[1:]


def outlier_ratio(attention: Tensor) -> float:
    """Share of patches whose attention [N] lies above the third quartile by 1.5 interquartile ranges."""
    attention = attention.double()
    low, high = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    return int((attention > high + 1.5 * (high - low)).sum()) / len(attention)


def plus_centres(attention: Tensor, ratio: float, adaptive: bool = True) -> Tensor:
    """PruMerge+ centres [K] as published: the top int(N * ratio) by attention [N], then patches of a grid.

    Adaptive (`if_adaptive=True` in the authors' code, `ratio` from `outlier_ratio`): grid patches run from 0 with
    stride int(int(1 / ratio) / 3) up to, not including, N - 1, without those already there. Otherwise
    (`if_adaptive=False`, `ratio` given): they run from int(step / 2) with stride step = int(1 / ratio), and patches
    that are centres already are repeated. Where the original fails we take stride 1 (ratio above 1/3), for ratio 0
    the stride of a single outlier, and a grid of another length than the top.
    """
    n = len(attention)
    top = descending(attention)[: int(n * ratio)]
    step = max(1, int(1 / ratio)) if ratio > 0 else n
    start, stride = (0, max(1, step // 3)) if adaptive else (step // 2, step)
    grid = torch.arange(start, max(n - 1, start + 1), stride, device=attention.device)
    return torch.cat([top, grid[~torch.isin(grid, top)] if adaptive else grid])


def plus_centres_exact(attention: Tensor, count: int) -> Tensor:
    """`count` distinct centres for a fixed budget, our choice: a quarter by attention, the rest evenly spaced
    over the other patches, since three grid patches an outlier is what the adaptive rule aims at."""
    top = descending(attention)[: -(-count // 4)]
    free = torch.ones_like(attention, dtype=torch.bool).index_fill(0, top, False).nonzero()[:, 0]
    return torch.cat([top, free[uniform_stride(len(free), count - len(top), free.device)]])


def merge(features: Tensor, keys: Tensor, attention: Tensor, centres: Tensor) -> Tensor:
    """One row a centre and one for all the rest [K+1, C], from patch features and keys [N, C].

    A centre becomes itself plus its 32 nearest of a pool by cosine of keys (all of it when it is smaller), each times
    its raw attention [N], not normalised. The pool holds the other centres and the patches that are no centre. The last
    row sums the patches that are no centre, times attention.

    Repeated centres (PruMerge+ with `if_adaptive=False`) are as in the authors' code: each has the other one in its
    pool, and so many of the first patches that are no centre are in no pool and not in the last row.

    Args:
        centres: patch indices [K], repeated ones allowed.
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
    """Outliers of CLS attention, each with its neighbours merged in, plus one row for all the rest.

    `keep` rows = `keep` - 1 centres + the extra row. Not ascending: centres come in descending attention and
    the extra row, put at position N - 1, last. The published queries and keys are those of the CLIP layer
    AFTER the one that the projector reads (`clip_next_*`); a tower cut off there has none, then those of the
    used layer stand in and extra["layer"] says "used".
    """

    name = "prumerge"
    merges = True
    needs = frozenset({"clip_hidden", "clip_keys", "clip_queries", "project"})
    source = "arXiv 2403.15388, github.com/42Shawn/LLaVA-PruMerge"

    adaptive: bool = False
    """Let the image decide how many rows there are, which is the authors' default; `keep` is then ignored. Otherwise
    `keep` - 1 centres, which is theirs with `if_adaptive=False` and `reduction_ratio` = (`keep` - 1) / N."""

    def centres(self, attention: Tensor, keep: int) -> Tensor:
        """Patch numbers of the centres [K] in output order."""
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
    """PruMerge with evenly spaced centres added: centres by attention, then by grid, then the extra row.

    Adaptive, it is the authors' (`plus_centres`). For a fixed budget the division into attention and grid is ours
    (`plus_centres_exact`): the authors' fixed rule repeats patches and is defined for few budgets only.
    """

    name = "prumerge_plus"

    def centres(self, attention: Tensor, keep: int) -> Tensor:
        if self.adaptive:
            return plus_centres(attention, outlier_ratio(attention))
        return plus_centres_exact(attention, keep - 1)
