"""CDPruner: a determinantal point process (DPP) weighted by relevance to the question (arXiv 2506.10967)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.similarity import cosine

# residuals below this fraction of the largest kernel entry are float32 rounding errors, not new volume
EXHAUSTED = 1e-6


def relevance(image_embeds: Tensor, text_embeds: Tensor, sign: float = -1.0) -> Tensor:
    """Relevance [N] in (0, 1] of patches [N, E] to text segments [M, E] in CLIP's joint space.

    It is `sign` times the mean cosine, shifted to start at 1e-6 and divided by its range; 1 everywhere if all cosines
    are equal. The sign of the published code is minus: for LLaVA's CLIP tower a LOW cosine marks a relevant patch,
    although the paper's text says the opposite. Check the sign before using another tower.
    """
    score = sign * cosine(image_embeds, text_embeds).mean(1)
    low, high = score.aminmax()
    return torch.where(high > low, (score - low + 1e-6) / (high - low), torch.ones_like(score))


def cdpruner(tokens: Tensor, quality: Tensor, r: int) -> Tensor:
    """Greedy MAP inference of the DPP with kernel q_i cos(V_i, V_j) q_j: `r` indices [r] in order of selection.

    tokens [N, D], quality [N]; O(N^2 D + r^2 N), by incremental Cholesky in float32. Beyond the rank of `tokens` no
    token adds volume; there the published code divides by the square root of a rounding error and returns fewer tokens.
    Here the remaining tokens are selected by quality; ties go to the lower index.
    """
    quality = quality.float()
    kernel = quality[:, None] * cosine(tokens) * quality
    residual = kernel.diagonal().clone()
    floor = EXHAUSTED * residual.max()
    fallback = quality.clone()
    factor = kernel.new_zeros(r, len(kernel))
    order = []
    for step in range(r):
        best = residual.argmax(keepdim=True)
        volume = residual[best] > floor
        pick = torch.where(volume, best, fallback.argmax(keepdim=True))
        order.append(pick)
        row = kernel.index_select(0, pick)[0] - factor.index_select(1, pick)[:, 0] @ factor
        row = torch.where(volume, row / residual[pick].clamp(min=floor).sqrt(), torch.zeros_like(row))
        factor[step] = row
        residual = (residual - row.square()).index_fill(0, pick, -math.inf)
        fallback = fallback.index_fill(0, pick, -math.inf)
    return torch.cat(order)


@dataclass(frozen=True)
class CDPruner(Selector):
    """Diverse tokens weighted by relevance to the question, both in CLIP's joint space.

    No MLLM contains CLIP's text tower and visual projection, which the authors load separately. The panel therefore
    does not include this selector. It needs `clip_image_embeds`, the visual projection of post_layernorm of the patches
    in the layer that the projector uses, and `clip_text_embeds`, the text tower's output for the question, split into
    segments of 77 tokens.
    """

    name = "cdpruner"
    needs = frozenset({"clip_image_embeds", "clip_text_embeds"})
    text_aware = True
    source = "arXiv 2506.10967, github.com/Theia-4869/CDPruner"

    sign: float = -1.0
    """Sign of the cosine in `relevance`."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        quality = relevance(inputs.clip_image_embeds, inputs.clip_text_embeds, self.sign)
        order = cdpruner(inputs.tokens, quality, keep)
        return Selection.of(order.sort().values, picking_order=order)
