"""CDPruner: a determinantal point process whose quality is relevance to the question (arXiv 2506.10967)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.similarity import cosine

# A residual this small against the largest kernel entry is rounding noise of float32, not new volume.
EXHAUSTED = 1e-6


def relevance(image_embeds: Tensor, text_embeds: Tensor, sign: float = -1.0) -> Tensor:
    """Relevance [N] in (0, 1] of patches [N, E] to text segments [M, E] of CLIP's joint space.

    `sign` times the mean cosine, shifted to start at 1e-6 and divided by its range. The published sign is
    minus: for the CLIP tower of LLaVA a LOW cosine marks a relevant patch, though the paper's text says the
    opposite. Check the sign before using another tower. All equal: 1 everywhere.
    """
    score = sign * cosine(image_embeds, text_embeds).mean(1)
    low, high = score.aminmax()
    return torch.where(high > low, (score - low + 1e-6) / (high - low), torch.ones_like(score))


def cdpruner(tokens: Tensor, quality: Tensor, r: int) -> Tensor:
    """Greedy MAP of the DPP with kernel q_i cos(V_i, V_j) q_j: `r` indices [r] in picking order.

    tokens [N, D], quality [N]; O(N^2 D + r^2 N). Incremental Cholesky in float32. Beyond the rank of
    `tokens` no token adds volume; the published code then divides by the root of noise and returns fewer
    tokens. Here the budget is filled by quality, lower index first among equals.
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

    No MLLM carries CLIP's text tower and visual projection, which the authors load besides, so the panel does not have
    this selector. Give `clip_image_embeds`, the visual projection of post_layernorm of the patches in the layer that
    the projector reads, and `clip_text_embeds`, the text tower's output for the question cut into segments of 77.
    """

    name = "cdpruner"
    needs = frozenset({"clip_image_embeds", "clip_text_embeds"})
    text_aware = True
    source = "arXiv 2506.10967, github.com/Theia-4869/CDPruner"

    sign: float = -1.0
    """Direction of relevance, see `relevance`."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        quality = relevance(inputs.clip_image_embeds, inputs.clip_text_embeds, self.sign)
        order = cdpruner(inputs.tokens, quality, keep)
        return Selection.of(order.sort().values, picking_order=order)
