"""Local search: change one kept token of the best mask at a time, and join the changes that help. Ours."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from evocomp.search.strategy import State, Strategy, require

# how many of the changes that helped are joined, as shares: all together can overshoot where groups interact
JOINED = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class HillClimb(Strategy):
    """Most candidates are the best mask with another token kept in one group.

    All N - G such masks are tried in random order, none twice, until one is better; then it starts from
    that one. When none is left the best mask is a local optimum, and two or three groups change at once.
    A few candidates join the changes of the last population that helped. With a linear loss a population so
    gains the sum of its good changes, and not only the largest of them.

    Args:
        q: candidates per population; one of them is the best so far, which costs no evaluation.
    """

    flips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 2 + len(JOINED)
        require(self.q >= least, f"hill_climb search needs q of at least {least} candidates, got q={self.q}")

    def propose(self, state: State, rng: np.random.Generator) -> np.ndarray:
        head = np.concatenate([state.best[None], _joined(state.population, state.losses)])
        return np.concatenate([head, self._neighbours(state, rng, self.q - len(head))])

    def _neighbours(self, state: State, rng: np.random.Generator, count: int) -> np.ndarray:
        groups = state.groups
        genomes = np.repeat(state.best[None], count, axis=0)
        rivals = np.flatnonzero(groups.places != state.best[groups.of])
        if not len(rivals):
            return genomes
        # the order belongs to the step at which the best was found, so that later steps go on in it
        rivals = rivals[np.argsort(state.rng(state.improved, lane=1).random(len(rivals)))]
        singles = self.q - 1 - len(JOINED)
        tried = (state.step - state.improved) * singles
        single = rivals[tried : tried + singles]
        genomes[np.arange(len(single)), groups.of[single]] = groups.places[single]
        far = genomes[len(single) :]
        flips = rivals[(rng.random((3, len(far))) * len(rivals)).astype(int)]
        third = rng.random(len(far)) < 0.5
        always = np.ones(len(far), dtype=bool)
        for flip, used in zip(flips, (always, always, third), strict=True):
            rows = np.flatnonzero(used)
            far[rows, groups.of[flip[rows]]] = groups.places[flip[rows]]
        return genomes


def _joined(population: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Row 0 [G] of the population [P, G] with the changes of its best rows, one mask per share [., G]."""
    base = population[0]
    ranking = np.argsort(losses, kind="stable")
    helped = population[ranking[: int((losses < losses[0]).sum())]]
    changed = helped != base
    joined = []
    for share in JOINED:
        top = int(np.ceil(share * len(helped)))
        if top:
            # of several changes in one group the best counts: argmax finds the first row that has one
            first = changed[:top].argmax(0)
            joined.append(np.where(changed[:top].any(0), helped[first, np.arange(len(base))], base))
    return np.array(joined, dtype=np.int32).reshape(-1, len(base))
