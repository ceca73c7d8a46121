"""Plain binary cross-entropy ("CE" in the paper's ablation)."""

import torch.nn.functional as F
from torch import Tensor

from evocomp.losses import masked


def bce_loss(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy over the valid tokens of the batch.

    Args:
        logits: [B, N], any floating dtype; computed in fp32 (fp64 for fp64).
        targets: [B, N] in [0, 1]: hard labels (bool or float) or soft labels.
        valid: [B, N] bool, False for padding, whose values are ignored.
    """
    logits = masked.clean(logits, valid)
    targets = masked.clean(targets.to(logits.dtype), valid)
    return masked.mean(F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), valid)
