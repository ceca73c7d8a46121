"""Binary cross-entropy weighted by gradient density, in plain torch with a closed-form backward."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from evocomp.ops.precision import compute_dtype, full_precision


def _clean(logits: Tensor, targets: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and targets in the compute dtype, with zeros in padding (which may contain NaN)."""
    dtype = compute_dtype(logits)
    logits, targets = logits.to(dtype), targets.to(dtype)
    if valid is not None:
        logits, targets = logits.masked_fill(~valid, 0), targets.masked_fill(~valid, 0)
    return logits, targets


def _bin(slope: Tensor, bins: int) -> Tensor:
    # the lower clamp is for NaN, which converts to an arbitrary integer: the loss must be NaN, not an index error
    return (slope.abs() * bins).long().clamp_(0, bins - 1)


def ghm_histogram(logits: Tensor, targets: Tensor, valid: Tensor | None = None, bins: int = 10) -> Tensor:
    """See `evocomp.ops.ghm_histogram`."""
    with torch.no_grad():
        logits, targets = _clean(logits, targets, valid)
        index = _bin(torch.sigmoid(logits) - targets, bins)
        member = torch.ones_like(index) if valid is None else valid.long()
        # scatter_add_ instead of bincount, which copies its largest value to the host
        counts = torch.zeros(bins, dtype=torch.long, device=logits.device)
        return counts.scatter_add_(0, index.flatten(), member.flatten())


def bin_weights(counts: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """1 / GD of each bin, 0 for an empty bin. counts: [bins], integers or running means."""
    counts = counts.to(dtype)
    occupied = counts > 0
    regions = counts.numel() if rule == "paper" else occupied.sum()
    return torch.where(occupied, 1 / (counts * regions), torch.zeros_like(counts))


class _GHMBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, valid: Tensor | None, counts: Tensor, rule: str) -> Tensor:
        x, y = _clean(logits, targets, valid)
        slope = torch.sigmoid(x) - y
        weight = bin_weights(counts, rule, x.dtype)[_bin(slope, counts.numel())]
        if valid is not None:
            weight = weight.masked_fill(~valid, 0)
        ctx.save_for_backward(weight * slope)
        ctx.dtype = logits.dtype
        return (weight * F.binary_cross_entropy_with_logits(x, y, reduction="none")).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(ctx.dtype), None, None, None, None


def ghm_bce(logits: Tensor, targets: Tensor, valid: Tensor | None, counts: Tensor, rule: str) -> Tensor:
    """See `evocomp.ops.ghm_bce`; here `counts` is required."""
    with full_precision(logits):
        return _GHMBCE.apply(logits, targets, valid, counts, rule)
