"""CLS attention: the patches with the largest attention from the vision tower's class token (CLS)."""

from dataclasses import dataclass

from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.top_r import top_r


def cls_scores(attention: Tensor) -> Tensor:
    """Attention of CLS averaged over heads, [H, N] -> [N] in float32."""
    return attention.float().mean(0)


@dataclass(frozen=True)
class ClsAttention(Selector):
    """The `keep` patches with the largest CLS attention, as in FasterVLM and, on a single image, HiRED."""

    name = "cls_attention"
    needs = frozenset({"cls_attention"})
    source = "FasterVLM, arXiv 2412.01818"

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        return Selection.of(top_r(cls_scores(inputs.cls_attention), keep))
