"""DivPrune: greedy max-min diversity (arXiv 2503.02175; code vbdi/divprune)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.similarity import cosine


def divprune(tokens: Tensor, r: int) -> Tensor:
    """Indices [r] of `r` rows of `tokens` [N, D] in order of selection; O(N^2 D + r N).

    The distance is one minus the cosine. The first token is the one farthest from its nearest other token; each further
    token is the one farthest from its nearest selected token. Ties go to the lower index. No token is selected twice,
    even if only duplicates remain (the published code can return a token twice).
    """
    distance = (1 - cosine(tokens)).fill_diagonal_(math.inf)
    pick = distance.amin(0).argmax(keepdim=True)
    nearest = torch.full_like(distance[0], math.inf)
    order = []
    for _ in range(r):
        order.append(pick)
        nearest = torch.minimum(nearest, distance.index_select(0, pick)[0]).index_fill(0, pick, -math.inf)
        pick = nearest.argmax(keepdim=True)
    return torch.cat(order)


@dataclass(frozen=True)
class DivPrune(Selector):
    """Max-min diverse tokens. The published budget for a ratio is int(round(ratio * N))."""

    name = "divprune"
    source = "arXiv 2503.02175, github.com/vbdi/divprune"

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        order = divprune(inputs.tokens, keep)
        return Selection.of(order.sort().values, picking_order=order)
