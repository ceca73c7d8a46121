"""VisPruner: half by CLS attention, half by thinning near-duplicates (arXiv 2412.01818)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.cls_attention import cls_scores
from evocomp.selection.similarity import cosine
from evocomp.selection.top_r import descending

REMOVED_PER_ROUND = 8


def vispruner(features: Tensor, scores: Tensor, r: int, important_ratio: float = 0.5) -> Tensor:
    """`r` ascending indices from CLIP patch features [N, C] (before the projector) and CLS scores [N].

    int(r * important_ratio) tokens go by score. The others, in descending score, are thinned: even places
    are compared with odd places and up to eight of those with the closest partner go, a round at a time;
    survivors of the even places, closest partner first, then come before the odd places. An odd number of
    tokens makes the even places the longer half (the published code raises IndexError there).
    """
    important = int(r * important_ratio)
    order = descending(scores)
    kept, rest = order[:important], order[important:]
    wanted = r - important
    if wanted == 0:
        return kept.sort().values
    similarity = cosine(features)
    while len(rest) > wanted:
        drop = min(REMOVED_PER_ROUND, len(rest) - wanted)
        even, odd = rest[0::2], rest[1::2]
        partner = similarity[even[:, None], odd].amax(1)
        rest = torch.cat([even[descending(partner)][drop:], odd])
    return torch.cat([kept, rest]).sort().values


@dataclass(frozen=True)
class VisPruner(Selector):
    """Important and diverse patches. important_ratio=1 is FasterVLM.

    The thinning follows exact places in the ranking, so a last-bit change of the attention can alter many
    of the diverse tokens.
    """

    name = "vispruner"
    needs = frozenset({"clip_hidden", "cls_attention"})
    source = "arXiv 2412.01818, github.com/Theia-4869/VisPruner"

    important_ratio: float = 0.5
    """Share of the budget that goes by attention; the authors also show 0.75 at 64 tokens."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        scores = cls_scores(inputs.cls_attention)
        return Selection.of(vispruner(inputs.clip_hidden[1:], scores, keep, self.important_ratio))
