"""DivPrune: greedy max-min diversity (arXiv 2503.02175; code vbdi/divprune)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.similarity import cosine


def divprune(tokens: Tensor, r: int) -> Tensor:
    """`r` rows of `tokens` [N, D] in the order in which they are picked [r]; O(N^2 D + r N).

    Distance is one minus cosine. The first pick lies farthest from its nearest other token, each further one
    farthest from its nearest picked token; the lower index wins ties. A picked token cannot be picked
    again, even where only duplicates are left (the published code can return it twice).
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
    """Max-min diverse tokens; the published budget for a ratio is int(round(ratio * N))."""

    name = "divprune"
    source = "arXiv 2503.02175, github.com/vbdi/divprune"

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        order = divprune(inputs.tokens, keep)
        return Selection.of(order.sort().values, picking_order=order)
