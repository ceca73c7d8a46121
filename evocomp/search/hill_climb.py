"""Local search: changes one kept token of the best mask at a time, and combines improvements. Not in the paper."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from evocomp.search.strategy import State, Strategy, require

# fractions of the improvements that are combined: because groups interact, combining all can be worse than some
JOINED = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class HillClimb(Strategy):
    """Hill climbing: most candidates are the best mask with another token kept in one group.

    All N - G such neighbours are tried in random order, each once, until one is better; the search continues from that
    one. If none is better, the best mask is a local optimum, and two or three groups are changed at once. A few
    candidates combine changes of the last population that lowered the loss. If the effects of changes add up, a
    population then gains the sum of its improvements instead of the largest one.

    Args:
        q: candidates per population, including the best candidate so far, which needs no evaluation.
    """

    flips: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 2 + len(JOINED)
        require(self.q >= least, f"hill_climb needs at least q={least} candidates, got q={self.q}")

    def propose(self, state: State, rng: np.random.Generator) -> np.ndarray:
        head = np.concatenate([state.best[None], _joined(state.population, state.losses)])
        return np.concatenate([head, self._neighbours(state, rng, self.q - len(head))])

    def _neighbours(self, state: State, rng: np.random.Generator, count: int) -> np.ndarray:
        groups = state.groups
        genomes = np.repeat(state.best[None], count, axis=0)
        others = np.flatnonzero(groups.places != state.best[groups.of])
        if not len(others):
            return genomes
        # random numbers of the step that found the best mask, so that later steps continue in the same order
        others = others[np.argsort(state.rng(state.improved, lane=1).random(len(others)))]
        singles = self.q - 1 - len(JOINED)
        tried = (state.step - state.improved) * singles
        single = others[tried : tried + singles]
        genomes[np.arange(len(single)), groups.of[single]] = groups.places[single]
        far = genomes[len(single) :]
        flips = others[(rng.random((3, len(far))) * len(others)).astype(int)]
        third = rng.random(len(far)) < 0.5
        always = np.ones(len(far), dtype=bool)
        for flip, used in zip(flips, (always, always, third), strict=True):
            rows = np.flatnonzero(used)
            far[rows, groups.of[flip[rows]]] = groups.places[flip[rows]]
        return genomes


def _joined(population: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Row 0 of the population [P, G] with the changes of its best rows: one genome per fraction in `JOINED`."""
    base = population[0]
    ranking = np.argsort(losses, kind="stable")
    helped = population[ranking[: int((losses < losses[0]).sum())]]
    changed = helped != base
    joined = []
    for share in JOINED:
        top = int(np.ceil(share * len(helped)))
        if top:
            # if several rows change a group, take the best row: argmax finds the first one
            first = changed[:top].argmax(0)
            joined.append(np.where(changed[:top].any(0), helped[first, np.arange(len(base))], base))
    return np.array(joined, dtype=np.int32).reshape(-1, len(base))
