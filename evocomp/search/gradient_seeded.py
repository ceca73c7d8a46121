"""Search seeded by a gradient of the MLLM. Not in the paper; the only strategy that needs more than forward passes."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from evocomp.grouping.groups import Groups
from evocomp.search.strategy import State, require
from evocomp.search.uniform_crossover import UniformCrossover


@dataclass(frozen=True)
class GradientSeeded(UniformCrossover):
    """`UniformCrossover` whose first population is drawn in part from a gradient over tokens.

    The caller supplies the prior [N]: minus the gradient of the answer loss with respect to a soft gate on each visual
    token, from one forward and backward pass (counted as three forward passes). The prior is standardised here, because
    the scale of gradients differs between samples.

    Args:
        temperature: temperature of the softmax over the standardised prior inside each group.
    """

    temperature: float = 0.5

    forward_only: ClassVar[bool] = False

    def start(
        self,
        groups: Groups,
        rng: np.random.Generator,
        population: np.ndarray | None = None,
        losses: np.ndarray | None = None,
        prior: np.ndarray | None = None,
    ) -> State:
        require(
            prior is not None or population is not None,
            "gradient_seeded needs the gradient of the answer loss as its prior; "
            "choose a strategy without gradients such as uniform_crossover",
        )
        if prior is not None:
            prior = np.asarray(prior, dtype=np.float64)
            prior = (prior - prior.mean()) / max(prior.std(), np.finfo(np.float64).tiny)
        return super().start(groups, rng, population, losses, prior)
