"""Nearest vocabulary row by cosine in plain torch, a chunk of the vocabulary at a time."""

import torch
from torch import Tensor

from evocomp.ops.precision import compute_dtype, full_precision

HALVES = (torch.bfloat16, torch.float16)


def _products(tokens: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """<v, e> [N, V] in `dtype`. GPUs multiply 16-bit inputs exactly and accumulate in float32."""
    if tokens.is_cuda and tokens.dtype == rows.dtype and tokens.dtype in HALVES:
        return torch.mm(tokens, rows.T, out_dtype=dtype)
    return tokens.to(dtype) @ rows.to(dtype).T


def _nearest(tokens: Tensor, rows: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(score <v, e> / |e| [N], index [N]) of the best of these rows."""
    norm = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
    allowed = norm > 0  # also False for NaN rows
    if mask is not None:
        allowed &= mask
    # only the rows' norms affect the argmax; in place, because the scores determine the peak memory
    return _products(tokens, rows, dtype).div_(norm).masked_fill_(~allowed, -torch.inf).max(dim=-1)


def vocabulary_argmax(
    tokens: Tensor, table: Tensor, mask: Tensor | None = None, chunk: int = 8192
) -> tuple[Tensor, Tensor]:
    """See `evocomp.ops.vocabulary_argmax`."""
    with full_precision(tokens), torch.no_grad():
        dtype = compute_dtype(tokens)
        best = tokens.new_full((tokens.shape[0],), -torch.inf, dtype=dtype)
        index = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
        for start in range(0, table.shape[0], chunk):
            part = slice(start, start + chunk)
            top, at = _nearest(tokens, table[part], None if mask is None else mask[part], dtype)
            better = top > best  # strict, so that ties between chunks go to the lowest id
            best = torch.where(better, top, best)
            index = torch.where(better, at + start, index)
        norm = torch.linalg.vector_norm(tokens, dim=-1, dtype=dtype)
        # a token of zero norm has cosine 0 with all rows, as in torch.nn.functional.cosine_similarity
        return index, torch.where(norm > 0, best / norm, best)
