"""The R best tokens of each image in their original order, by a threshold and prefix sums in plain torch."""

import torch
from torch import Tensor


def top_r_index(scores: Tensor, r: int, valid: Tensor | None) -> Tensor:
    """[B, R] ascending positions of the r best tokens; ties to the lowest position, padding last."""
    ranked = torch.nan_to_num(scores.detach(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if valid is not None:
        ranked = ranked.masked_fill(~valid, -torch.inf)  # what padding holds must not rank it
    threshold = ranked.topk(r, dim=-1).values[:, -1:]
    keep, equal = ranked > threshold, ranked == threshold
    # padding loses even to a token of score -inf
    for candidates in (equal,) if valid is None else (equal & valid, equal & ~valid):
        room = r - keep.sum(-1, keepdim=True)
        keep = keep | (candidates & (candidates.cumsum(-1) <= room))
    # kept tokens to slots 0..R-1, the others to one slot more, which is cut off: no nonzero, so no host sync
    slot = torch.where(keep, keep.cumsum(-1) - 1, r)
    positions = torch.arange(scores.shape[1], device=scores.device).expand_as(slot)
    return slot.new_empty(len(slot), r + 1).scatter_(1, slot, positions)[:, :r]


def gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor[..., b, index[b, k]] for tensor [..., B, N] and index [B, R]: [..., B, R]."""
    return tensor.gather(-1, index.expand(*tensor.shape[:-1], index.shape[-1]))


def gather_embeddings(embeddings: Tensor, index: Tensor) -> Tensor:
    """embeddings [B, N, D] at index [B, R]: [B, R, D]."""
    batch, tokens, width = embeddings.shape
    rows = index + torch.arange(0, batch * tokens, tokens, device=index.device)[:, None]
    return embeddings.reshape(-1, width).index_select(0, rows.flatten()).view(*index.shape, width)  # whole rows
