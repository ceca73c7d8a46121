"""The paper's evolutionary search (EvoComp, arXiv 2604.17087, Algorithm 1)."""

from dataclasses import dataclass

import numpy as np

from evocomp.search.operators import half_split_crossover, pairs, shift_mutation, truncation
from evocomp.search.strategy import State, Strategy, require


@dataclass(frozen=True)
class Published(Strategy):
    """Truncation selection, half-split crossover and shift mutation; the children replace the population.

    There is no elitism: the label is the best candidate ever evaluated, which `run` stores. The paper uses L = 10
    generations after the first population, 528 evaluations in all.

    Args:
        q: candidates per population.
        p: number of parents, the candidates of lowest loss.
        crossover: probability that a child has two parents.
        mutation: probability that a group's kept token moves to the previous or next token of the group.
    """

    p: int = 12
    crossover: float = 0.9
    mutation: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.p < self.q, f"search needs fewer parents than candidates: 1 <= p < q, got p={self.p}, q={self.q}"
        )
        require(0 <= self.crossover <= 1, f"crossover must be a probability, got {self.crossover}")
        require(0 <= self.mutation <= 1, f"mutation must be a probability, got {self.mutation}")

    def propose(self, state: State, rng: np.random.Generator) -> np.ndarray:
        parents = truncation(state.population, state.losses, self.p)
        first, other = pairs(len(parents), rng, self.q)
        children = half_split_crossover(parents[first], parents[other], rng, self.crossover)
        return shift_mutation(children, state.groups.sizes, rng, self.mutation)
