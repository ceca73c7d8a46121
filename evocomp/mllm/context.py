"""Context tokens: some of the R kept tokens are means of clusters of dropped tokens.

The log of each cluster's size is added to the attention logits of its context token, so that all N tokens keep their
share of the attention. This is ToMe's proportional attention (arXiv 2210.09461, section 3), applied to means of
dropped tokens, which VisionZip calls contextual tokens (arXiv 2412.04467). Selected tokens are passed on unchanged and
count once. Counting questions depend on these shares of the attention, and a selection without context tokens distorts
them. The combination is EvoComp's own; it is not in the paper.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from evocomp.log import UserError
from evocomp.ops import context_clusters


class Shown(NamedTuple):
    """The kept tokens of one image: what the LLM reads of it.

    tokens: [R, D]
    places: [R] index (0 to N - 1) of the visual token whose position each kept token takes, ascending
    log_size: [R] log of the number of visual tokens in each one's cluster, added to the attention logits of that key;
        None: every cluster has one token
    """

    tokens: Tensor
    places: Tensor
    log_size: Tensor | None = None

    @property
    def alone(self) -> Tensor:
        """Indices of the selected tokens, whose clusters have one token."""
        return self.places if self.log_size is None else self.places[self.log_size == 0]

    @property
    def merged(self) -> Tensor:
        """Indices of the context tokens whose clusters have several tokens."""
        return self.places[:0] if self.log_size is None else self.places[self.log_size > 0]


def split(keep: int, total: int, sharp: float) -> tuple[int, int]:
    """Split a token budget into selected tokens and context tokens.

    The number of tokens that a question needs unmerged does not grow with the budget. Of R kept tokens, R S / (R + S)
    are selected: nearly all of a small budget, and never more than S.

    Args:
        keep: R, all kept tokens.
        total: N, the visual tokens of the image.
        sharp: S, the maximum number of selected tokens; below 1 a fraction of N; 0: no context tokens.

    Returns:
        The number of selected tokens, and the number of context tokens.

    >>> [split(keep, 144, 1 / 6) for keep in (4, 8, 16, 48)]
    [(3, 1), (6, 2), (10, 6), (16, 32)]
    """
    if not sharp or not keep:
        return keep, 0
    limit = sharp if sharp >= 1 else sharp * total
    selected = max(1, round(keep * limit / (keep + limit)))
    return selected, keep - selected


def owners(visual: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster the dropped tokens, for several masks of one image.

    Cluster centres come from farthest-point sampling by cosine similarity, see `evocomp.ops.context_clusters`.

    Args:
        visual: [N, D].
        kept: [K, R] indices of the selected tokens.
        count: C, the number of context tokens, from 1 to the number of dropped tokens.

    Returns:
        Indices of the cluster centres [K, C], ascending, and the cluster assignment [K, N]: the index of each token's
        centre, or of the token itself if it is selected.
    """
    centres, assignment = context_clusters(visual[None], kept[None], count)
    return centres[0], assignment[0]


def means(visual: Tensor, centres: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster means [K, C, D] in the dtype of `visual`, and log of the cluster sizes [K, C] float32; see `owners`."""
    members = (owner[:, None, :] == centres[..., None]).float()
    sizes = members.sum(-1)
    return (members @ visual.float() / sizes[..., None]).to(visual.dtype), sizes.log()


def shown(visual: Tensor, selected: Tensor, context: int) -> Shown:
    """The selected tokens of an image, and its dropped tokens merged into context tokens.

    Args:
        visual: [N, D].
        selected: [S] indices of the selected tokens.
        context: number of context tokens; more than there are dropped tokens count as that many.
    """
    selected = selected.sort().values
    context = min(context, len(visual) - len(selected))
    if not context:
        return Shown(visual[selected], selected)
    centres, owner = owners(visual, selected[None], context)
    tokens, log_size = means(visual, centres, owner)
    places, order = torch.cat([selected, centres[0]]).sort()
    log_size = torch.cat([torch.zeros(len(selected), device=visual.device), log_size[0]])
    return Shown(torch.cat([visual[selected], tokens[0]])[order], places, log_size[order])


def add_log_size(seen: Tensor, log_size: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the log cluster sizes of keys to an attention mask.

    Args:
        seen: [B or 1, 1, q, keys], bool (True where a query attends to a key) or additive.
        log_size: log sizes of the first keys [B, up to keys]; the remaining keys have size 1.
        dtype: dtype of the queries.

    Returns:
        Additive mask [B, 1, q, keys]. Masked entries hold the lowest finite number, not -inf, so that a query that
        attends to no key (padding) does not become NaN.
    """
    lowest = torch.finfo(dtype).min
    added = F.pad(log_size, (0, seen.shape[-1] - log_size.shape[-1])).to(dtype)[:, None, None, :]
    if seen.dtype == torch.bool:
        return added.expand(-1, 1, seen.shape[2], -1).masked_fill(~seen, lowest)
    return (seen + added).masked_fill(seen <= lowest / 2, lowest)


def check_weighable(config: PreTrainedConfig) -> None:
    """Raise UserError unless this decoder's attention accepts weights of keys, as context tokens need."""
    kernel = config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise UserError(
            f"context tokens need an additive attention mask, which {kernel} does not accept; load the model with "
            "attn_implementation='sdpa', or use no context tokens (context=0)"
        )
