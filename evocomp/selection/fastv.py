"""FastV: after a shallow LLM layer, drop what the last token does not look at (arXiv 2403.06764)."""

from dataclasses import dataclass

from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.llm_attention import visual_columns
from evocomp.selection.top_r import top_r

# (K, R): tokens are ranked in layer K - 1 and a share R of them dropped before layer K
PUBLISHED = ((2, 0.5), (2, 0.75), (3, 0.5))


def fastv(attention: Tensor, r: int) -> Tensor:
    """`r` ascending indices by the last query's attention on visual tokens [H, N], averaged over heads."""
    return top_r(attention.float().mean(0), r)


def fastv_kept(n: int, ratio: float) -> int:
    """Tokens left of `n` when a share `ratio` is dropped: round(n * (1 - ratio)), Python's rounding."""
    return round(n * (1 - ratio))


@dataclass(frozen=True)
class FastV(Selector):
    """FastV's ranking; exactly `keep`. The published drop happens before layer `k`, positions unchanged."""

    name = "fastv"
    needs = frozenset({"llm_attention", "text"})
    text_aware = True
    needs_llm = True
    source = "arXiv 2403.06764, github.com/pkunlp-icler/FastV"

    k: int = 2
    """Tokens are ranked by layer k - 1: 2 in the paper, 3 in the authors' Hugging Face demo."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        return Selection.of(fastv(visual_columns(inputs, self.k - 1, 1)[:, -1], keep))
