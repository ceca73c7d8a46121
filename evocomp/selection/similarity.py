"""Cosine similarity in float32 for inputs of any dtype, shared by all selectors."""

import torch.nn.functional as F
from torch import Tensor


def cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosines [N, M] of the rows of `x` [N, D] with the rows of `y` [M, D] (default: `x`); 0 for zero rows."""
    x = F.normalize(x.float(), dim=-1)
    return x @ (x if y is None else F.normalize(y.float(), dim=-1)).T
