"""The ask / tell interface of every search strategy.

    state = strategy.start(groups, rng)
    while ...:
        state, genomes = strategy.ask(state)          # [Q, G]
        state = strategy.tell(state, losses)          # [Q]

A state is immutable and carries its own key of random numbers: asking the same state twice gives the same
genomes. The caller evaluates, so a search never knows where losses come from.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from evocomp.grouping.groups import Groups
from evocomp.log import UserError
from evocomp.search.genome import random_genomes, seed_genomes


@dataclass(frozen=True, eq=False)
class State:
    """Where a search stands.

    Attributes:
        groups: groups of the sample's N visual tokens.
        key: key of the random numbers of this search.
        step: number of populations asked for.
        pending: [Q, G] candidates asked for and not told yet.
        population: [P, G] candidates from which the next ones are made; empty before the first tell.
        losses: [P] their losses, float32.
        best: [G] best genome ever told, with its loss `best_loss`.
        improved: value of `step` when the best was last replaced.
        odds: [N] odds of keeping each token, in the order of `groups.order` (cross-entropy method only).
    """

    groups: Groups
    key: tuple[int, int]
    step: int = 0
    pending: np.ndarray | None = None
    population: np.ndarray | None = None
    losses: np.ndarray | None = None
    best: np.ndarray | None = None
    best_loss: float = float("inf")
    improved: int = 0
    odds: np.ndarray | None = None

    def rng(self, step: int | None = None, lane: int = 0) -> np.random.Generator:
        """Random numbers of one step (the current one by default); lanes of a step are independent."""
        counter = [0, 0, lane, self.step if step is None else step]
        return np.random.Generator(np.random.Philox(key=np.array(self.key, dtype=np.uint64), counter=counter))


@dataclass(frozen=True)
class Strategy:
    """Base of the strategies: draws the first population, keeps the best; subclasses make the children.

    Args:
        q: candidates per population.
        seeded: share of the first population drawn from a prior over tokens, when one is given.
        temperature: of the softmax over the prior inside each group.
    """

    q: int = 48
    seeded: float = 0.5
    temperature: float = 1.0

    forward_only: ClassVar[bool] = True
    """Whether the search needs losses only; otherwise it needs gradients of the MLLM as its prior."""

    flips: ClassVar[bool] = False
    """Whether most candidates differ from one mask in one place, so that a scorer may share what comes before it."""

    def __post_init__(self) -> None:
        require(self.q >= 1, f"search needs q of at least 1 candidate, got q={self.q}")
        require(0 <= self.seeded <= 1, f"seeded is a share between 0 and 1, got {self.seeded}")
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")

    def start(
        self,
        groups: Groups,
        rng: np.random.Generator,
        population: np.ndarray | None = None,
        losses: np.ndarray | None = None,
        prior: np.ndarray | None = None,
    ) -> State:
        """A new search.

        Args:
            groups: groups of the sample.
            rng: see `genome.stream`; one key is drawn from it.
            population: [P, G] genomes to begin with, best first.
            losses: [P] their losses, when known: the first `ask` then gives their children. Otherwise it
                gives these genomes, as many as fit, filled up at random.
            prior: [N] token scores, higher is better (a compressor's logits, say): a share `seeded` of the
                first population is drawn from them. Not with `losses`.
        """
        first, second = (int(word) for word in rng.integers(0, 2**64, size=2, dtype=np.uint64))
        state = State(groups, (first, second))
        population = _fit(np.empty((0, groups.count)) if population is None else population, groups)
        if losses is not None:
            assert prior is None, "after a population with losses come its children: no place for seeds"
            return self.tell(replace(state, pending=population), losses)
        seeds = 0 if prior is None else round(self.seeded * self.q)
        if seeds:
            drawn = seed_genomes(groups, prior, state.rng(), seeds, self.temperature)
            population = np.concatenate([population[: self.q - seeds], drawn])
        return replace(state, step=1, population=population[: self.q])

    def ask(self, state: State) -> tuple[State, np.ndarray]:
        """The candidates [Q, G] to be evaluated next, and the state that `tell` wants."""
        rng = state.rng()
        if state.losses is None:
            fill = random_genomes(state.groups.sizes, rng, self.q - len(state.population))
            genomes = np.concatenate([state.population, fill])
        else:
            genomes = self.propose(state, rng)
        return replace(state, step=state.step + 1, pending=genomes), genomes

    def tell(self, state: State, losses: np.ndarray) -> State:
        """Take in the losses [Q] of the candidates asked for last."""
        assert state.pending is not None, "tell comes after ask"
        losses = np.asarray(losses, dtype=np.float32)
        assert losses.shape == (len(state.pending),), f"expected [{len(state.pending)}], got {losses.shape}"
        lowest = int(np.argmin(losses))
        # before `absorb`, so that a strategy can build on the best
        if losses[lowest] < state.best_loss or state.best is None:
            best = state.pending[lowest]
            state = replace(state, best=best, best_loss=float(losses[lowest]), improved=state.step)
        return replace(self.absorb(state, losses), pending=None)

    def propose(self, state: State, rng: np.random.Generator) -> np.ndarray:
        """The next candidates [Q, G], from an evaluated population."""
        raise NotImplementedError

    def absorb(self, state: State, losses: np.ndarray) -> State:
        """The population after its candidates were evaluated; by default they replace it."""
        return replace(state, population=state.pending, losses=losses)


def require(condition: bool, message: str) -> None:
    """Refuse a setting of the search with one line."""
    if not condition:
        raise UserError(message)


def _fit(population: np.ndarray, groups: Groups) -> np.ndarray:
    population = np.asarray(population, dtype=np.int32)
    shaped = population.ndim == 2 and population.shape[1] == groups.count
    require(
        shaped and bool(((population >= 0) & (population < groups.sizes)).all()),
        f"the stored population {list(population.shape)} does not fit the sample's {groups.count} groups: "
        "it was made with another grouping; choose another label folder or --labels.overwrite=true",
    )
    return population
