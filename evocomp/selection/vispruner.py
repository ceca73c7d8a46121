"""VisPruner: half of the tokens by CLS attention, half by removing near-duplicates (arXiv 2412.01818)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.cls_attention import cls_scores
from evocomp.selection.similarity import cosine
from evocomp.selection.top_r import descending

REMOVED_PER_ROUND = 8


def vispruner(features: Tensor, scores: Tensor, r: int, important_ratio: float = 0.5) -> Tensor:
    """Ascending indices [r] of the kept tokens, from CLIP features [N, C] before the projector and CLS scores [N].

    int(r * important_ratio) tokens are selected by score. The others, in descending order of score, are reduced in
    rounds: each token with an even index in this order is compared with all tokens with an odd index, and up to eight
    of the even ones with the most similar partner are removed. The order of the next round is the remaining even ones,
    most similar partner first, then the odd ones. If the number of tokens is odd, the even half is longer (the
    published code raises IndexError there).
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

    The removal of near-duplicates depends on the exact ranking, so that a rounding difference in the attention can
    change many of the diverse tokens.
    """

    name = "vispruner"
    needs = frozenset({"clip_hidden", "cls_attention"})
    source = "arXiv 2412.01818, github.com/Theia-4869/VisPruner"

    important_ratio: float = 0.5
    """Fraction of the budget that is selected by attention; the authors also report 0.75 at 64 tokens."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        scores = cls_scores(inputs.cls_attention)
        return Selection.of(vispruner(inputs.clip_hidden[1:], scores, keep, self.important_ratio))
