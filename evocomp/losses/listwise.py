"""Listwise loss on credits per token (ListNet, Cao et al. 2007: cross-entropy of top-one probabilities)."""

import torch
from torch import Tensor

from evocomp.ops.precision import compute_dtype


def listwise_loss(logits: Tensor, credits: Tensor, valid: Tensor | None = None, temperature: float = 0.1) -> Tensor:
    """Mean over samples of the cross-entropy between softmax(credits / temperature) and softmax(logits).

    Args:
        logits: [B, N], any floating dtype; computed in fp32 (fp64 for fp64).
        credits: [B, N] credits per token, any real numbers; tokens with higher credits should be kept.
        valid: [B, N] bool, False for padding, which is excluded from both softmaxes and whose values are ignored. A
            sample that consists of padding contributes 0.
        temperature: temperature of the target distribution, in units of the credits.
    """
    dtype = compute_dtype(logits)
    logits, credits = logits.to(dtype), credits.to(dtype) / temperature
    if valid is None:
        return -(credits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    # a large finite number instead of -inf, because 0 * -inf would be NaN
    floor = torch.finfo(dtype).min / 4
    target = credits.masked_fill(~valid, floor).softmax(-1).masked_fill(~valid, 0)
    log_prob = logits.masked_fill(~valid, floor).log_softmax(-1).masked_fill(~valid, 0)
    return -(target * log_prob).sum(-1).mean()
