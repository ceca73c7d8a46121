"""Focal loss (Lin et al. 2017, arXiv 1708.02002), an ablation of the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evocomp.losses import masked


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
) -> Tensor:
    """Mean over valid tokens of alpha_t |p - y|^gamma BCE(p, y), alpha_t = y alpha + (1 - y)(1 - alpha).

    For hard labels |p - y| = 1 - p_t, so this is the focal loss of arXiv 1708.02002 (eq. 5); for soft labels it is the
    quality focal loss of arXiv 2006.04388.

    Args:
        logits: [B, N], any floating dtype; computed in fp32 (fp64 for fp64).
        targets: [B, N] in [0, 1], bool or floating.
        valid: [B, N] bool, False for padding, whose values are ignored.
        gamma: focusing exponent.
        alpha: weight of positive tokens; None: both classes have weight 1.
    """
    logits = masked.clean(logits, valid)
    targets = masked.clean(targets.to(logits.dtype), valid)
    distance = (torch.sigmoid(logits) - targets).abs()
    loss = distance**gamma * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if alpha is not None:
        loss = loss * (targets * alpha + (1 - targets) * (1 - alpha))
    return masked.mean(loss, valid)
