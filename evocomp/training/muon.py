"""Muon with the Newton-Schulz iteration in the dtype of the weights.

torch.optim.Muon runs it in bfloat16. CPUs without bfloat16 units emulate that, and spend most of a training step on it.
"""

import math

import torch
from torch import Tensor


class FullPrecisionMuon(torch.optim.Muon):
    """torch.optim.Muon without the cast to bfloat16; same arguments, state and update rule.

    Source: https://kellerjordan.github.io/posts/muon/. Only the learning-rate scaling `match_rms_adamw`
    (https://arxiv.org/abs/2502.16982) is supported.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Update all weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["adjust_lr_fn"] != "match_rms_adamw":
                raise ValueError(f"adjust_lr_fn={group['adjust_lr_fn']!r}: only 'match_rms_adamw' is supported")
            weights: list[Tensor] = []
            gradients: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, weights, gradients, buffers)
            for weight, gradient, buffer in zip(weights, gradients, buffers, strict=True):
                buffer.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                update = newton_schulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))
        return loss


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximation of the nearest orthogonal matrix [A, B], in the dtype of the matrix.

    With X = U S V^T, each step maps S to a S + b S^3 + c S^5.
    """
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=eps)  # spectral norm at most 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
