"""VisionZip: dominant patches by CLS attention; the rest are merged into contextual tokens (arXiv 2412.04467)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.top_r import top_r


def visionzip_split(keep: int) -> tuple[int, int]:
    """(dominant, contextual) rows for a budget in the published ratio 27 : 5, so that 64 = 54 + 10; half rounds up."""
    contextual = int(keep * 5 / 32 + 0.5)
    return keep - contextual, contextual


def visionzip(
    hidden: Tensor, attention: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [dominant + contextual, C] for the projector, and their indices.

    hidden [N+1, C] (row 0 is CLS), attention [H, N], keys [N+1, C] (heads concatenated). Returns (rows, dominant
    indices, target indices) with indices into `hidden`: patch p is row p + 1. Dominant rows are CLS and the `dominant`
    - 1 patches with the largest attention, in spatial order. Of the remaining rows every step-th is a target, and each
    other one is assigned to the target whose head-averaged key has the highest cosine. As published, a contextual row
    is the target PLUS the mean of the rows assigned to it, not an average: its norm is up to twice that of other rows.
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
    """CLS, dominant patches, then contextual rows; exactly `keep` rows, all passed through the projector.

    Positions are not ascending: contextual rows come last, each at the position of its target. CLS has no position and
    gets 0. `clip_keys` are those of the layer that `cls_attention` comes from.
    """

    name = "visionzip"
    merges = True
    needs = frozenset({"clip_hidden", "cls_attention", "clip_keys", "project"})
    source = "arXiv 2412.04467, github.com/dvlab-research/VisionZip"

    dominant: int | None = None
    """Number of dominant rows, including CLS; None: the published ratio of 27 to 5."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        dominant = visionzip_split(keep)[0] if self.dominant is None else min(self.dominant, keep)
        rows, chosen, targets = visionzip(
            inputs.clip_hidden, inputs.cls_attention, inputs.clip_keys, dominant, keep - dominant
        )
        positions = torch.cat([chosen[:1], chosen[1:] - 1, targets - 1])
        extra = {"dominant": chosen[1:] - 1, "contextual": targets - 1}
        return Selection(positions, tokens=inputs.project(rows), extra=extra)
