"""Training losses: learning from labels (`build_loss`) and from masks of one's own (`policy_loss`)."""

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
