"""The cross-entropy method: a search that adapts a distribution over masks.

Reuven Y. Rubinstein, "The cross-entropy method for combinatorial and continuous optimization",
Methodology and Computing in Applied Probability, 1999.
"""

from dataclasses import dataclass, replace

import numpy as np

from evocomp.search.genome import sample_genomes
from evocomp.search.operators import truncation
from evocomp.search.strategy import State, Strategy, require


@dataclass(frozen=True)
class CrossEntropy(Strategy):
    """Each group has a distribution over its tokens, which is moved towards the best candidates of every population.

    Args:
        q: candidates per population, including the best candidate so far, which needs no evaluation.
        p: number of best candidates of a population that the distribution is moved towards.
        rate: step size of the move, above 0 and up to 1.
        floor: weight of the uniform distribution that is mixed in when candidates are drawn, so that every token can
            still be drawn.
    """

    p: int = 12
    rate: float = 0.5
    floor: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.p < self.q, f"search needs 1 <= p < q, got p={self.p}, q={self.q}")
        require(0 < self.rate <= 1, f"rate must be above 0 and at most 1, got {self.rate}")
        require(0 <= self.floor < 1, f"floor must be at least 0 and below 1, got {self.floor}")

    def propose(self, state: State, rng: np.random.Generator) -> np.ndarray:
        uniform = _uniform(state)
        odds = (1 - self.floor) * state.odds + self.floor * uniform
        genomes = sample_genomes(odds, state.groups, rng, self.q)
        genomes[0] = state.best
        return genomes

    def absorb(self, state: State, losses: np.ndarray) -> State:
        elite = truncation(state.pending, losses, self.p)
        chosen = (state.groups.offsets + elite).ravel()
        frequency = np.bincount(chosen, minlength=state.groups.num_tokens) / len(elite)
        odds = _uniform(state) if state.odds is None else state.odds
        odds = (1 - self.rate) * odds + self.rate * frequency
        return replace(state, population=state.pending, losses=losses, odds=odds)


def _uniform(state: State) -> np.ndarray:
    sizes = state.groups.sizes
    return np.repeat(1.0 / sizes, sizes)
