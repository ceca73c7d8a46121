"""The R best tokens of each image in their original order, in plain torch."""

import torch
from torch import Tensor


def top_r_index(scores: Tensor, r: int, valid: Tensor | None) -> Tensor:
    """Ascending indices [B, R] of the r best tokens; ties go to the lowest index, padding is last."""
    ranked = torch.nan_to_num(scores.detach(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if valid is not None:
        ranked = ranked.masked_fill(~valid, -torch.inf)  # values in padding must not affect its rank
    threshold = ranked.topk(r, dim=-1).values[:, -1:]
    keep, equal = ranked > threshold, ranked == threshold
    # padding is ranked below tokens of score -inf
    for candidates in (equal,) if valid is None else (equal & valid, equal & ~valid):
        remaining = r - keep.sum(-1, keepdim=True)
        keep = keep | (candidates & (candidates.cumsum(-1) <= remaining))
    # kept tokens go to slots 0..R-1, all others to an extra slot that is cut off: `nonzero` would synchronise the host
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
    return embeddings.reshape(-1, width).index_select(0, rows.flatten()).view(*index.shape, width)  # copies full rows
