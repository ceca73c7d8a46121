"""Checks for NaN and infinite weights: after a diverged training, the choice of tokens would be arbitrary."""

import torch
from torch import nn

from evocomp.log import UserError


def has_finite_weights(module: nn.Module) -> bool:
    """Whether all weights are finite; for a sharded module, those of this process."""
    return all(
        bool(torch.isfinite(weight.to_local() if hasattr(weight, "to_local") else weight).all())
        for weight in module.state_dict().values()
        if weight.is_floating_point()
    )


def check_finite_weights(module: nn.Module, what: str, advice: str) -> None:
    """Raise UserError unless all weights are finite.

    Args:
        what: name of the module in the message.
        advice: what the user should do.
    """
    if not has_finite_weights(module):
        raise UserError(f"{what} has weights that are not finite (NaN or infinite): {advice}")
