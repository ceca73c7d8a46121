"""Training losses: supervised losses on labels (`build_loss`), and a policy loss on proposed masks (`policy_loss`)."""

from evocomp.losses.policy import (
    group_relative_advantages,
    plackett_luce_log_prob,
    policy_loss,
)
from evocomp.losses.total import LOSSES, SupervisedLoss, build_loss

__all__ = [
    "LOSSES",
    "SupervisedLoss",
    "build_loss",
    "group_relative_advantages",
    "plackett_luce_log_prob",
    "policy_loss",
]
