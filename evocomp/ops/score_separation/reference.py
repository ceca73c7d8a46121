"""Classifier logits and cosine separation in plain torch with a closed-form backward, O(N D)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evocomp.ops.precision import compute_dtype, full_precision

# lower bound of norms, as in torch.nn.functional.cosine_similarity
EPS = 1e-8


def _clean(hidden: Tensor, valid: Tensor | None) -> Tensor:
    """`hidden` in the compute dtype, with zeros in padding, because NaN times 0 would be NaN."""
    hidden = hidden.to(compute_dtype(hidden))
    return hidden if valid is None else hidden.masked_fill(~valid[..., None], 0)


def _segments(retained: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Indicators [B, 2, N] of discarded (I0) and retained (I1) tokens; padding is in neither."""
    discarded = ~retained
    if valid is not None:
        retained, discarded = retained & valid, discarded & valid
    return torch.stack([discarded, retained], dim=1).to(dtype)


class _ScoreSeparation(torch.autograd.Function):
    """(hidden, weight | None, bias | None) -> (logits | None, separation)"""

    @staticmethod
    def forward(ctx, hidden, weight, bias, retained, valid):
        h = _clean(hidden, valid)
        norm = torch.linalg.vector_norm(h, dim=-1)  # [B, N]
        inverse = norm.clamp_min(EPS).reciprocal()
        segment = _segments(retained, valid, h.dtype)
        size = segment.sum(-1, keepdim=True).clamp_min(1)  # [B, 2, 1]
        means = (segment * inverse[:, None]) @ h / size  # [B, 2, D]; an empty segment's mean is 0
        separation = (means[:, 0] * means[:, 1]).sum(-1)
        logits = None
        if weight is not None:
            logits = h @ weight.to(h.dtype)
            logits = logits if bias is None else logits + bias.to(h.dtype)
            logits = logits if valid is None else logits.masked_fill(~valid, 0)
        ctx.save_for_backward(hidden, weight, bias, retained, valid, norm, means, size)
        return logits, separation

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logits, grad_separation):
        hidden, weight, bias, retained, valid, norm, means, size = ctx.saved_tensors
        with full_precision(hidden):
            h = _clean(hidden, valid)
            segment = _segments(retained, valid, h.dtype)
            # the gradient of a token of one segment is along the mean of the other segment
            pull = means.flip(1) / size * grad_separation[:, None, None]  # [B, 2, D]
            inverse = norm.clamp_min(EPS).reciprocal()
            along = ((h @ pull.mT) * segment.mT).sum(-1)  # [B, N]: <pull_i, h_i>
            # for norms below EPS the unit vector is h / EPS, which is linear in h, so there is no projection
            shrink = torch.where(norm > EPS, along * inverse**3, torch.zeros_like(along))
            grad = (segment * inverse[:, None]).mT @ pull - shrink[..., None] * h
            grad_weight = grad_bias = None
            if weight is not None:
                if valid is not None:
                    grad_logits = grad_logits.masked_fill(~valid, 0)
                grad += grad_logits[..., None] * weight.to(h.dtype)
                grad_weight = torch.einsum("bn,bnd->d", grad_logits, h).to(weight.dtype)
                if bias is not None:
                    grad_bias = grad_logits.sum().to(bias.dtype).reshape(bias.shape)
            return grad.to(hidden.dtype), grad_weight, grad_bias, None, None


def score_separation(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, retained: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `evocomp.ops.score_separation`."""
    with full_precision(hidden):
        return _ScoreSeparation.apply(hidden, weight, bias, retained, valid)


def cosine_separation(hidden: Tensor, retained: Tensor, valid: Tensor | None) -> Tensor:
    """See `evocomp.ops.cosine_separation`."""
    with full_precision(hidden):
        return _ScoreSeparation.apply(hidden, None, None, retained, valid)[1]
