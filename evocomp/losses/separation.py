"""Cosine separation (CS), the paper's second loss term."""

import torch
from torch import Tensor

from evocomp.ops import cosine_separation


def retained_tokens(targets: Tensor) -> Tensor:
    """[B, N] bool: True for tokens that the label keeps; soft targets above 1/2 count as kept."""
    return targets if targets.dtype == torch.bool else targets > 0.5


def separation_loss(hidden: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over samples of the mean cosine between discarded and retained tokens of the sample.

    A sample without discarded or without retained tokens contributes 0 to the mean.

    Args:
        hidden: [B, N, D] outputs of the compressor's layer at the visual tokens.
        targets: [B, N] in [0, 1], bool or floating.
        valid: [B, N] bool, False for padding, which is in neither segment.
    """
    return cosine_separation(hidden, retained_tokens(targets), valid).mean()
