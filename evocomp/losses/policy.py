"""Policy gradient on masks: the compressor's scores define a Plackett-Luce distribution over ordered subsets.

A mask of r tokens is drawn one token at a time without replacement, each with probability proportional to exp(logit)
among the tokens not yet drawn (Plackett 1975; sampled by the Gumbel top-k trick, arXiv 1903.06059). The loss is the
clipped objective of PPO (arXiv 1707.06347) with group-relative advantages (GRPO, arXiv 2402.03300).
"""

import torch
from torch import Tensor

from evocomp.losses import masked
from evocomp.ops.precision import compute_dtype


def plackett_luce_log_prob(logits: Tensor, draws: Tensor, valid: Tensor | None = None) -> Tensor:
    """Log-probability of drawing these tokens in this order, without replacement.

    Args:
        logits: [B, N], any floating dtype; computed in fp32 (fp64 for fp64).
        draws: [B, K, R] int64, distinct indices of valid tokens in draw order.
        valid: [B, N] bool, False for padding, which is never drawn and whose values are ignored.

    Returns:
        [B, K] log-probabilities; differentiable in the logits.
    """
    scores = masked.clean(logits, valid)[:, None].expand(-1, draws.shape[1], -1)  # [B, K, N]
    chosen = scores.gather(2, draws)
    left = torch.ones_like(scores, dtype=torch.bool).scatter(2, draws, False)
    if valid is not None:
        left = left & valid[:, None]
    never = scores.masked_fill(~left, -torch.inf).logsumexp(-1, keepdim=True)  # -inf if all are drawn
    # the pool of draw t consists of draws t..R and the tokens never drawn; cumulative log-sum-exp from the end
    tail = chosen.flip(-1).logcumsumexp(-1).flip(-1)
    return (chosen - torch.logaddexp(tail, never)).sum(-1)


def group_relative_advantages(losses: Tensor, clip: float = 6.0) -> Tensor:
    """(mean - loss) / (std + 0.1) within each sample, from clipped losses; higher is better.

    Args:
        losses: [B, K] answer losses of K >= 2 masks per sample [nats].
        clip: value at which losses are clipped [nats].

    Returns:
        [B, K] advantages; they sum to 0 in each sample.

    >>> group_relative_advantages(torch.tensor([[0.0, 1.0, 2.0]])).tolist()[0]  # doctest: +ELLIPSIS
    [0.909..., 0.0, -0.909...]
    """
    assert losses.shape[-1] >= 2, "advantages need at least two masks per sample"
    losses = losses.to(compute_dtype(losses)).clamp(max=clip)
    return (losses.mean(-1, keepdim=True) - losses) / (losses.std(-1, keepdim=True) + 0.1)


def policy_loss(
    logits: Tensor,
    draws: Tensor,
    advantages: Tensor,
    old_log_prob: Tensor,
    valid: Tensor | None = None,
    clip: float = 0.2,
    variance_weight: float = 1e-4,
) -> dict[str, Tensor]:
    """Clipped policy gradient loss on stored masks, plus a small penalty on the variance of the logits.

    ratio = (pi / pi_old)^(1/R); policy = -mean min(ratio a, clip(ratio, 1 - clip, 1 + clip) a). The R-th root keeps the
    ratio of large masks near 1. For pi = pi_old the gradient is that of REINFORCE, -mean a d log pi / R.

    Args:
        logits: [B, N]; differentiated.
        draws: [B, K, R] stored draws in draw order.
        advantages: [B, K] stored advantages.
        old_log_prob: [B, K] stored `plackett_luce_log_prob` of the draws, under the policy that drew them.
        valid: [B, N] bool.
        clip: half-width of the ratio's trust region.
        variance_weight: weight of the mean variance of a sample's valid logits.

    Returns:
        dict of scalars: "loss" = "policy" + variance_weight x "logit_variance"; "clipped", the fraction of masks whose
        ratio is outside the trust region (without gradient).
    """
    log_prob = plackett_luce_log_prob(logits, draws, valid)
    ratio = ((log_prob - old_log_prob) / draws.shape[-1]).exp()
    limited = ratio.clamp(1 - clip, 1 + clip)
    policy = -torch.minimum(ratio * advantages, limited * advantages).mean()
    variance = _logit_variance(logits, valid)
    return {
        "loss": policy + variance_weight * variance,
        "policy": policy,
        "logit_variance": variance,
        "clipped": (ratio != limited).to(policy.dtype).mean().detach(),
    }


def _logit_variance(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over samples of the (biased) variance of the valid logits."""
    logits = masked.clean(logits, valid)
    valid = torch.ones_like(logits, dtype=torch.bool) if valid is None else valid
    size = valid.sum(-1, keepdim=True).clamp_min(1)
    centred = (logits - logits.sum(-1, keepdim=True) / size).masked_fill(~valid, 0)
    return (centred.square().sum(-1, keepdim=True) / size).mean()
