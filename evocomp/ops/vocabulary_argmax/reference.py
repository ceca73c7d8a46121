"""Nearest vocabulary row by cosine in plain torch, a chunk of the vocabulary at a time."""

import torch
from torch import Tensor

from evocomp.ops.precision import compute_dtype, full_precision


def vocabulary_argmax(
    tokens: Tensor, table: Tensor, mask: Tensor | None = None, chunk: int = 8192
) -> tuple[Tensor, Tensor]:
    """See `evocomp.ops.vocabulary_argmax`."""
    dtype = compute_dtype(tokens)
    with full_precision(tokens), torch.no_grad():
        tokens = tokens.to(dtype)
        best = tokens.new_full((tokens.shape[0],), -torch.inf)
        index = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
        for start in range(0, table.shape[0], chunk):
            rows = table[start : start + chunk].to(dtype)
            norm = torch.linalg.vector_norm(rows, dim=-1)
            allowed = norm > 0  # false for NaN rows too
            if mask is not None:
                allowed &= mask[start : start + chunk]
            # only the row's norm matters to the argmax: a token's own positive scale moves nothing
            scores = (tokens @ rows.T) / norm
            top, at = scores.masked_fill_(~allowed, -torch.inf).max(dim=-1)
            better = top > best  # strict, so that the lowest id keeps a tie between chunks
            best = torch.where(better, top, best)
            index = torch.where(better, at + start, index)
        norm = torch.linalg.vector_norm(tokens, dim=-1)
        # a token of zero norm has cosine 0 with everything, as in torch.nn.functional.cosine_similarity
        return index, torch.where(norm > 0, best / norm, best)
