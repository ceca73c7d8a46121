"""VisionZip: dominant patches by CLS attention, the rest folded into contextual tokens (arXiv 2412.04467)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.top_r import top_r


def visionzip_split(keep: int) -> tuple[int, int]:
    """(dominant, contextual) rows for a budget: the published 27 : 5, so 64 = 54 + 10, half rounded up."""
    contextual = int(keep * 5 / 32 + 0.5)
    return keep - contextual, contextual


def visionzip(
    hidden: Tensor, attention: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [dominant + contextual, C] for the projector, with the row numbers they stand on.

    hidden [N+1, C] (row 0 CLS), attention [H, N], keys [N+1, C] (heads concatenated). Returns (rows,
    dominant row numbers, target row numbers), numbers counted in `hidden`: patch p is row p + 1. Dominant
    rows are CLS and the `dominant` - 1 patches with most attention, in spatial order. Of the remaining
    rows every step-th is a target, and each other one joins the target whose head-averaged key has the
    highest cosine. A contextual row is its target PLUS the mean of those that joined, as published: up to
    twice the norm of an ordinary row, not an average.
    """
    patches = top_r(attention.float().sum(0), dominant - 1) + 1
    chosen = torch.cat([patches.new_zeros(1), patches])
    if contextual == 0:
        return hidden[chosen], chosen, chosen[:0]
    heads = attention.shape[0]
    metric = F.normalize(keys.float().unflatten(1, (heads, -1)).mean(1), dim=-1)
    free = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device).index_fill(0, chosen, False)
    rest = free.nonzero()[:, 0]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    others = free.index_fill(0, targets, False).nonzero()[:, 0]
    joins = (metric[others] @ metric[targets].T).argmax(1)
    joined = hidden.new_zeros(len(targets), hidden.shape[1], dtype=torch.float32)
    joined = joined.index_add(0, joins, hidden[others].float())
    count = torch.bincount(joins, minlength=len(targets)).clamp(min=1)
    merged = hidden[targets].float() + joined / count[:, None]
    return torch.cat([hidden[chosen], merged.to(hidden.dtype)]), chosen, targets


@dataclass(frozen=True)
class VisionZip(Selector):
    """CLS, dominant patches, then contextual rows; exactly `keep` rows through the projector.

    Not ascending: contextual rows come last, each at its target's position. CLS has no position of its
    own and is given 0. `clip_keys` are those of the layer that `cls_attention` comes from.
    """

    name = "visionzip"
    merges = True
    needs = frozenset({"clip_hidden", "cls_attention", "clip_keys", "project"})
    source = "arXiv 2412.04467, github.com/dvlab-research/VisionZip"

    dominant: int | None = None
    """Dominant rows, CLS included; None: the published split of 27 to 5."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        dominant = visionzip_split(keep)[0] if self.dominant is None else min(self.dominant, keep)
        rows, chosen, targets = visionzip(
            inputs.clip_hidden, inputs.cls_attention, inputs.clip_keys, dominant, keep - dominant
        )
        positions = torch.cat([chosen[:1], chosen[1:] - 1, targets - 1])
        extra = {"dominant": chosen[1:] - 1, "contextual": targets - 1}
        return Selection(positions, tokens=inputs.project(rows), extra=extra)
