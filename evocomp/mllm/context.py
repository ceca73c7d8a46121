"""Context tokens: some of the R tokens that the LLM reads are means of those that were dropped.

Each carries log(number of tokens that it stands for) into the attention logits of the LLM, so that all N tokens keep
their share of the attention: proportional attention of ToMe (arXiv 2210.09461, section 3), on means of what a selector
left out, as VisionZip's contextual tokens are (arXiv 2412.04467). Selected tokens stay sharp and count once. Where a
question asks how many, the share of the attention is the answer, and a selection alone distorts it. Ours.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from evocomp.log import UserError
from evocomp.ops import context_clusters


class Shown(NamedTuple):
    """Visual tokens that the LLM reads of one picture.

    tokens: [R, D]
    places: [R] which of the N visual tokens' places each takes, ascending
    log_size: [R] log of how many tokens each stands for, added to the logits of the attention to it; None: one each
    """

    tokens: Tensor
    places: Tensor
    log_size: Tensor | None = None

    @property
    def alone(self) -> Tensor:
        """Places of the tokens that stand for themselves only: the selected ones."""
        return self.places if self.log_size is None else self.places[self.log_size == 0]

    @property
    def merged(self) -> Tensor:
        """Indices of the context tokens that stand for several tokens each."""
        return self.places[:0] if self.log_size is None else self.places[self.log_size > 0]


def split(keep: int, total: int, sharp: float) -> tuple[int, int]:
    """How many of `keep` tokens are selected, and how many are context.

    What a question needs to see sharply does not grow with the budget: R S / (R + S) are selected, nearly all of few
    and never more than S.

    Args:
        keep: R, as a whole.
        total: N.
        sharp: S, a number of tokens, or below 1 a share of N; 0: no context tokens.

    >>> [split(keep, 144, 1 / 6) for keep in (4, 8, 16, 48)]
    [(3, 1), (6, 2), (10, 6), (16, 32)]
    """
    if not sharp or not keep:
        return keep, 0
    limit = sharp if sharp >= 1 else sharp * total
    selected = max(1, round(keep * limit / (keep + limit)))
    return selected, keep - selected


def owners(visual: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which token speaks for which, for several masks of one picture.

    Centres by farthest-point sampling on cosines, see `evocomp.ops.context_clusters`.

    Args:
        visual: [N, D].
        kept: [K, R] selected tokens.
        count: C, context tokens, from 1 to as many as are dropped.

    Returns:
        Centres [K, C] ascending, and the owner [K, N] of each token: a centre, or the token itself if selected.
    """
    centres, assignment = context_clusters(visual[None], kept[None], count)
    return centres[0], assignment[0]


def means(visual: Tensor, centres: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Mean tokens [K, C, D] in the format of `visual`, and log of their sizes [K, C] float32; see `owners`."""
    members = (owner[:, None, :] == centres[..., None]).float()
    sizes = members.sum(-1)
    return (members @ visual.float() / sizes[..., None]).to(visual.dtype), sizes.log()


def shown(visual: Tensor, selected: Tensor, context: int) -> Shown:
    """The selected tokens [R] of a picture [N, D] as they are, and what is dropped in so many context tokens."""
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
    """An attention mask in which keys have sizes.

    Args:
        seen: [B or 1, 1, q, keys], True where a query sees a key, or what is added to the logits instead.
        log_size: of the first keys [B, up to keys]; the others stand for themselves.
        dtype: format of the queries.

    Returns:
        What is added to the logits [B, 1, q, keys]; the lowest number where nothing is seen, so that a query which
        sees nothing at all (padding) is not NaN.
    """
    lowest = torch.finfo(dtype).min
    added = F.pad(log_size, (0, seen.shape[-1] - log_size.shape[-1])).to(dtype)[:, None, None, :]
    if seen.dtype == torch.bool:
        return added.expand(-1, 1, seen.shape[2], -1).masked_fill(~seen, lowest)
    return (seen + added).masked_fill(seen <= lowest / 2, lowest)


def check_weighable(config: PreTrainedConfig) -> None:
    """Raise UserError unless this decoder's attention can take sizes of keys."""
    kernel = config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise UserError(
            f"context tokens need weights in the attention, and {kernel} takes none; load the model with "
            "attn_implementation='sdpa', or leave them out (context=0)"
        )
