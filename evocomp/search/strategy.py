"""The ask-and-tell interface of search strategies.

    state = strategy.start(groups, rng)
    while ...:
        state, genomes = strategy.ask(state)          # [Q, G]
        state = strategy.tell(state, losses)          # [Q]

A state is immutable and contains the key of its random numbers: asking the same state twice gives the same genomes. The
caller evaluates the genomes, so a strategy does not depend on the source of the losses.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from evocomp.grouping.groups import Groups
from evocomp.log import UserError
from evocomp.search.genome import random_genomes, seed_genomes


@dataclass(frozen=True, eq=False)
class State:
    """State of a search.

    Attributes:
        groups: groups of the sample's N visual tokens. key: key of the random numbers of this search. step: number of
        populations returned by `ask`. pending: [Q, G] candidates returned by `ask` whose losses are not known yet.
        population: [P, G] candidates from which the next ones are made; empty before the first `tell`. losses: [P]
        their losses, float32. best: [G] best genome so far, with its loss `best_loss`. improved: value of `step` when
        `best` last changed. odds: [N] probability of each token within its group, in the order of `groups.order`
        (cross-entropy method only).
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
        """Random number generator of one step (default: the current one); the lanes of a step are independent."""
        counter = [0, 0, lane, self.step if step is None else step]
        return np.random.Generator(np.random.Philox(key=np.array(self.key, dtype=np.uint64), counter=counter))


@dataclass(frozen=True)
class Strategy:
    """Base class of the strategies. It draws the first population and tracks the best candidate.

    Subclasses implement `propose`, and `absorb` if the children do not simply replace the population.

    Args:
        q: candidates per population.
        seeded: fraction of the first population that is drawn from a prior over tokens, if there is one.
        temperature: temperature of the softmax over the prior inside each group.
    """

    q: int = 48
    seeded: float = 0.5
    temperature: float = 1.0

    forward_only: ClassVar[bool] = True
    """Whether losses are sufficient; otherwise the strategy needs a gradient of the MLLM as its prior."""

    flips: ClassVar[bool] = False
    """Whether most candidates differ from one mask in a single token, so that the scorer can cache a common prefix."""

    def __post_init__(self) -> None:
        require(self.q >= 1, f"search needs at least q=1 candidate, got q={self.q}")
        require(0 <= self.seeded <= 1, f"seeded must be a fraction between 0 and 1, got {self.seeded}")
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")

    def start(
        self,
        groups: Groups,
        rng: np.random.Generator,
        population: np.ndarray | None = None,
        losses: np.ndarray | None = None,
        prior: np.ndarray | None = None,
    ) -> State:
        """Start a search.

        Args:
            groups: groups of the sample.
            rng: see `genome.stream`; one key is drawn from it.
            population: [P, G] initial genomes, best first.
            losses: [P] their losses, if known: the first `ask` then returns their children. Otherwise it returns the
                first q of these genomes, filled up with random ones.
            prior: [N] token scores, higher is better (for instance a compressor's logits), from which the fraction
                `seeded` of the first population is drawn. Must be None if `losses` is given.
        """
        first, second = (int(word) for word in rng.integers(0, 2**64, size=2, dtype=np.uint64))
        state = State(groups, (first, second))
        population = _fit(np.empty((0, groups.count)) if population is None else population, groups)
        if losses is not None:
            assert prior is None, "a prior is used only if the population has no losses"
            return self.tell(replace(state, pending=population), losses)
        seeds = 0 if prior is None else round(self.seeded * self.q)
        if seeds:
            drawn = seed_genomes(groups, prior, state.rng(), seeds, self.temperature)
            population = np.concatenate([population[: self.q - seeds], drawn])
        return replace(state, step=1, population=population[: self.q])

    def ask(self, state: State) -> tuple[State, np.ndarray]:
        """Return the state to pass to `tell`, and the next candidates [Q, G] to evaluate."""
        rng = state.rng()
        if state.losses is None:
            fill = random_genomes(state.groups.sizes, rng, self.q - len(state.population))
            genomes = np.concatenate([state.population, fill])
        else:
            genomes = self.propose(state, rng)
        return replace(state, step=state.step + 1, pending=genomes), genomes

    def tell(self, state: State, losses: np.ndarray) -> State:
        """Return the state after the losses [Q] of the candidates of the last `ask`."""
        assert state.pending is not None, "tell comes after ask"
        losses = np.asarray(losses, dtype=np.float32)
        assert losses.shape == (len(state.pending),), f"expected [{len(state.pending)}], got {losses.shape}"
        lowest = int(np.argmin(losses))
        # before `absorb`, so that a strategy can use the new best candidate
        if losses[lowest] < state.best_loss or state.best is None:
            best = state.pending[lowest]
            state = replace(state, best=best, best_loss=float(losses[lowest]), improved=state.step)
        return replace(self.absorb(state, losses), pending=None)

    def propose(self, state: State, rng: np.random.Generator) -> np.ndarray:
        """The next candidates [Q, G], made from an evaluated population."""
        raise NotImplementedError

    def absorb(self, state: State, losses: np.ndarray) -> State:
        """The state after the candidates were evaluated; by default they replace the population."""
        return replace(state, population=state.pending, losses=losses)


def require(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def _fit(population: np.ndarray, groups: Groups) -> np.ndarray:
    population = np.asarray(population, dtype=np.int32)
    shaped = population.ndim == 2 and population.shape[1] == groups.count
    require(
        shaped and bool(((population >= 0) & (population < groups.sizes)).all()),
        f"the stored population {list(population.shape)} does not match the sample's {groups.count} groups because it "
        "was made with another grouping; choose another label folder or --labels.overwrite=true",
    )
    return population
