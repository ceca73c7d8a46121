"""Token Merging on projected tokens (ToMe, arXiv 2210.09461; code facebookresearch/ToMe)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.similarity import cosine
from evocomp.selection.top_r import descending


def tome_step(metric: Tensor, values: Tensor, sizes: Tensor, remove: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge `remove` of m rows into others by one step of bipartite soft matching, remove <= m // 2.

    metric [m, C], values [m, D], sizes [m] (number of tokens merged into a row). Each even row is matched with the odd
    row of highest cosine; the `remove` most similar pairs are merged by a mean weighted by size. Returns (values,
    sizes, row): row [m] maps input rows to output rows. The output order is as published: unmerged even rows by
    descending similarity, then odd rows.
    """
    m = len(metric)
    assert 0 <= remove <= m // 2, f"one step cannot remove {remove} of {m} rows"
    best, target = cosine(metric[0::2], metric[1::2]).max(1)
    order = descending(best)
    merged, alone = order[:remove], order[remove:]
    row = torch.empty(m, dtype=torch.long, device=metric.device)
    row[2 * alone] = torch.arange(len(alone), device=row.device)
    row[1::2] = torch.arange(m // 2, device=row.device) + len(alone)
    row[2 * merged] = target[merged] + len(alone)
    total = sizes.new_zeros(m - remove).index_add(0, row, sizes)
    summed = values.new_zeros(m - remove, values.shape[1]).index_add(0, row, values * sizes[:, None])
    return summed / total[:, None], total, row


def tome(tokens: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat `tome_step` until `r` rows remain: (values [r, D], sizes [r], row [N]) in ToMe's order.

    There is no published schedule for projected tokens; ours removes min(m // 2, m - r) rows per step, with the current
    rows as metric. Computed in float32.
    """
    values = tokens.float()
    sizes = torch.ones(len(tokens), device=tokens.device)
    row = torch.arange(len(tokens), device=tokens.device)
    while len(values) > r:
        remove = min(len(values) // 2, len(values) - r)
        values, sizes, moved = tome_step(values, values, sizes, remove)
        row = moved[row]
    return values, sizes, row


@dataclass(frozen=True)
class ToMe(Selector):
    """Averages similar tokens; exactly `keep` rows.

    ToMe's output order does not follow the image. Rows are therefore sorted by the index of the first token merged into
    each (our choice), which is also the row's position. extra: `sizes` [R]; `row` [N], the output row of each token.
    """

    name = "tome"
    merges = True
    source = "arXiv 2210.09461, github.com/facebookresearch/ToMe"

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        values, sizes, row = tome(inputs.tokens, keep)
        member = torch.arange(len(row), device=row.device)
        first = torch.full_like(member[:keep], len(row)).scatter_reduce(0, row, member, "amin")
        positions, order = first.sort()
        extra = {"sizes": sizes[order].long(), "row": order.argsort()[row]}
        return Selection(positions, tokens=values[order].to(inputs.tokens.dtype), extra=extra)
