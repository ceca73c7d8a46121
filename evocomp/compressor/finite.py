"""Whether weights are numbers: a training that has diverged leaves NaN, and then tokens are kept by chance."""

import torch
from torch import nn

from evocomp.log import UserError


def has_finite_weights(module: nn.Module) -> bool:
    """Whether all weights are finite; of a sharded module, this process's part of them."""
    return all(
        bool(torch.isfinite(weight.to_local() if hasattr(weight, "to_local") else weight).all())
        for weight in module.state_dict().values()
        if weight.is_floating_point()
    )


def check_finite_weights(module: nn.Module, what: str, advice: str) -> None:
    """Raise UserError unless all weights are finite.

    Args:
        what: the module's name for the message.
        advice: what to do.
    """
    if not has_finite_weights(module):
        raise UserError(f"{what} has weights that are not finite (NaN or infinite): {advice}")
