"""An evolutionary search with (mu + lambda) selection and uniform crossover. Not in the paper; better at equal cost."""

from dataclasses import dataclass, replace

import numpy as np

from evocomp.search.genome import keys
from evocomp.search.operators import pairs, resample_mutation, uniform_crossover
from evocomp.search.strategy import State, Strategy, require


@dataclass(frozen=True)
class UniformCrossover(Strategy):
    """Parents are the best distinct candidates so far; children take each group from either parent.

    Unlike in the published search, parents survive (so the best is never lost), groups are inherited independently
    instead of in halves of the image, and a mutation can select any token of a group.

    Args:
        q: candidates per population.
        p: number of survivors, which are the parents.
        resampled: expected number of groups of a child whose kept token is redrawn.
    """

    p: int = 12
    resampled: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.p >= 1, f"search needs at least 1 parent, got p={self.p}")
        require(self.resampled > 0, f"resampled must be a positive number of groups, got {self.resampled}")

    def propose(self, state: State, rng: np.random.Generator) -> np.ndarray:
        first, other = pairs(len(state.population), rng, self.q)
        children = uniform_crossover(state.population[first], state.population[other], rng)
        return resample_mutation(children, state.groups.sizes, rng, self.resampled)

    def absorb(self, state: State, losses: np.ndarray) -> State:
        everyone = state.pending
        if state.population is not None and state.losses is not None:
            everyone = np.concatenate([state.population, state.pending])
            losses = np.concatenate([state.losses, losses])
        ranking = np.argsort(losses, kind="stable")
        distinct: dict[bytes, int] = {}
        for key, row in zip(keys(everyone[ranking]), ranking.tolist(), strict=True):
            distinct.setdefault(key, row)
        survivors = list(distinct.values())[: self.p]
        return replace(state, population=everyone[survivors], losses=losses[survivors])
