"""CLS attention: the patches that the vision tower's own summary token looks at."""

from dataclasses import dataclass

from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.top_r import top_r


def cls_scores(attention: Tensor) -> Tensor:
    """Mean over heads of the CLS row, [H, N] -> [N] in float32."""
    return attention.float().mean(0)


@dataclass(frozen=True)
class ClsAttention(Selector):
    """The `keep` patches with most CLS attention (FasterVLM's rule; HiRED's on a single image)."""

    name = "cls_attention"
    needs = frozenset({"cls_attention"})
    source = "FasterVLM, arXiv 2412.01818"

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        return Selection.of(top_r(cls_scores(inputs.cls_attention), keep))
