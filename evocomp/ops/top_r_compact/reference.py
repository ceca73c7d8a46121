"""The R best tokens of each image in their original order, by stable sorts in plain torch."""

import torch
from torch import Tensor


def top_r_index(scores: Tensor, r: int, valid: Tensor | None) -> Tensor:
    """[B, R] ascending positions of the r best tokens; ties to the lowest position, padding last."""
    ranked = torch.nan_to_num(scores.detach(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if valid is not None:
        ranked = ranked.masked_fill(~valid, -torch.inf)  # what padding holds must not rank it
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    if valid is not None:
        # a second stable sort, so that padding loses even to a token of score -inf
        last = (~valid).gather(1, order).to(torch.uint8).argsort(dim=-1, stable=True)
        order = order.gather(1, last)
    return order[:, :r].sort(dim=-1).values


def gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """tensor[..., b, index[b, k]] for tensor [..., B, N] and index [B, R]: [..., B, R]."""
    return tensor.gather(-1, index.expand(*tensor.shape[:-1], index.shape[-1]))


def gather_embeddings(embeddings: Tensor, index: Tensor) -> Tensor:
    """embeddings [B, N, D] at index [B, R]: [B, R, D]."""
    return embeddings.gather(1, index[..., None].expand(-1, -1, embeddings.shape[-1]))
