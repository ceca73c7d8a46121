"""SparseVLM: text tokens score visual tokens, and some dropped tokens are recycled by merging (arXiv 2410.04417).

It follows the authors' default version (v1); their second version is another method.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.llm_attention import visual_columns
from evocomp.selection.schedule import Stage
from evocomp.selection.top_r import descending, top_r

LAYERS = (2, 6, 15)
"""LLM layers after which tokens are dropped; tokens are ranked by the attention of that layer."""
KEPT = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Published numbers of tokens kept of 576 at each of LAYERS, by their nominal budget."""


def text_raters(visual: Tensor, text: Tensor) -> Tensor:
    """Indices of the text tokens that score visual tokens (raters), ascending [K].

    visual, text: input embeddings [N, D] and [T, D]. The relevance of a text token is the softmax of dot products over
    text tokens, averaged over visual tokens. Raters are the text tokens above the mean; all of them if none is above it
    (a single text token, or equal relevance).
    """
    share = (visual.float() @ text.float().T).softmax(1).mean(0)
    raters = (share > share.mean()).nonzero()[:, 0]
    return raters if len(raters) else torch.arange(len(text), device=text.device)


def sparsevlm_scores(attention: Tensor, raters: Tensor) -> Tensor:
    """Score of each visual token [N]: attention of text tokens to it [H, T, N], averaged over heads and raters."""
    return attention.float().mean(0)[raters].mean(0)


def recycled_count(dropped: int) -> tuple[int, int]:
    """(tokens, clusters): how many of `dropped` tokens are recycled, and into how many clusters they are merged."""
    tokens = min(int(0.3 * dropped) + 1, dropped)
    return tokens, int(tokens / 10) + 1 if tokens else 0


def cluster_and_merge(tokens: Tensor, clusters: int) -> Tensor:
    """Means [clusters, C] of density-peak clusters of `tokens` [M, C], in descending order of the centres' score.

    The distance is L2 / sqrt(C). The density is exp(-mean squared distance to the `clusters` nearest tokens, including
    itself). A token's score as a centre is its density times the distance to the nearest denser token. The published
    code breaks ties of densities by noise of 1e-6, so that its result depends on the seed if mutual nearest neighbours
    tie; here the lower index counts as denser.
    """
    x = tokens.float()
    m = len(x)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    nearest = distance.sort(1).values[:, : min(clusters, m)]
    density = (-nearest.square().mean(1)).exp()
    place = descending(density).argsort()
    denser = place[None, :] < place[:, None]
    gap = torch.where(denser, distance, distance.max()).amin(1)
    centres = descending(gap * density)[:clusters]
    member = distance[:, centres].argmin(1)
    member[centres] = torch.arange(clusters, device=x.device)
    count = torch.bincount(member, minlength=clusters)
    summed = x.new_zeros(clusters, x.shape[1]).index_add(0, member, x)
    return (summed / (count[:, None] + 1e-6)).to(tokens.dtype)


def sparsevlm_stage(hidden: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """One stage: (indices of kept tokens, ascending [k]; merged tokens [c, C]) of the LLM's M current visual tokens.

    hidden [M, C]: the layer's OUTPUT; scores [M]. k = min(keep, M - 1). The next layer's sequence is prefix, kept,
    merged, text, with positions renumbered from 0. In later stages, merged tokens are treated as visual tokens.
    """
    keep = min(keep, len(scores) - 1)
    order = descending(scores)
    tokens, clusters = recycled_count(len(scores) - keep)
    return order[:keep].sort().values, cluster_and_merge(hidden[order[keep : keep + tokens]], clusters)


def sparsevlm_stages(
    n: int = 576, kept: tuple[int, ...] = KEPT[192], layers: tuple[int, ...] = LAYERS
) -> tuple[Stage, ...]:
    """The schedule including merged tokens: 206, 145, 82 tokens per layer for the nominal budgets 192, 128, 64."""
    stages, rows = [], n
    for layer, wanted in zip(layers, kept, strict=True):
        left = min(wanted, rows - 1)
        rows = left + recycled_count(rows - left)[1]
        stages.append(Stage(layer + 1, rows))
    return tuple(stages)


@dataclass(frozen=True)
class SparseVLM(Selector):
    """The ranking of SparseVLM's first stage, applied once without recycling; keeps exactly `keep` tokens.

    `llm_attention` must contain the queries of all T text tokens. The published method drops and recycles tokens in
    stages inside the LLM: see `sparsevlm_stage` and `sparsevlm_stages`.
    """

    name = "sparsevlm"
    needs = frozenset({"llm_attention", "text"})
    text_aware = True
    needs_llm = True
    source = "arXiv 2410.04417, github.com/Gumpest/SparseVLMs"

    layer: int = LAYERS[0]
    """LLM layer whose attention ranks the tokens."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        raters = text_raters(inputs.tokens, inputs.text)
        scores = sparsevlm_scores(visual_columns(inputs, self.layer, len(inputs.text)), raters)
        return Selection.of(top_r(scores, keep), raters=raters)
