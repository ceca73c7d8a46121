"""FastV: after an early LLM layer, drop the tokens with the least attention from the last token (arXiv 2403.06764)."""

from dataclasses import dataclass

from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.llm_attention import visual_columns
from evocomp.selection.top_r import top_r

# (K, R): tokens are ranked in layer K - 1, and a fraction R of them is dropped before layer K
PUBLISHED = ((2, 0.5), (2, 0.75), (3, 0.5))


def fastv(attention: Tensor, r: int) -> Tensor:
    """Ascending indices [r] of the tokens with the largest attention [H, N] of the last query, averaged over heads."""
    return top_r(attention.float().mean(0), r)


def fastv_kept(n: int, ratio: float) -> int:
    """Number of tokens left of `n` after a fraction `ratio` is dropped: round(n * (1 - ratio)), Python's rounding."""
    return round(n * (1 - ratio))


@dataclass(frozen=True)
class FastV(Selector):
    """FastV's ranking; keeps exactly `keep` tokens. The published code drops tokens before layer `k` and keeps the
    position ids."""

    name = "fastv"
    needs = frozenset({"llm_attention", "text"})
    text_aware = True
    needs_llm = True
    source = "arXiv 2403.06764, github.com/pkunlp-icler/FastV"

    k: int = 2
    """Tokens are ranked by the attention of layer k - 1; k is 2 in the paper, 3 in the authors' Hugging Face demo."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        return Selection.of(fastv(visual_columns(inputs, self.k - 1, 1)[:, -1], keep))
