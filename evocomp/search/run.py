"""Run a search on one sample: ask, score what is new, tell."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from evocomp.grouping.groups import Groups
from evocomp.log import UserError
from evocomp.search.genome import keys as genome_keys
from evocomp.search.operators import truncation
from evocomp.search.strategy import State, Strategy

Score = Callable[[np.ndarray], np.ndarray]
"""Losses [K] of K masks: kept token indices [K, G] -> float32; called with distinct masks, each only once (unless
`remember` is off)."""


@dataclass(frozen=True, eq=False)
class WarmStart:
    """What a later search of the same sample continues from.

    Attributes:
        population: [P, G] genomes.
        losses: [P] their losses, float32.
        best: [G] best genome ever seen (the population need not hold it), with its loss `best_loss`.
    """

    population: np.ndarray
    losses: np.ndarray
    best: np.ndarray
    best_loss: float


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Outcome of a search. Losses are mean answer losses in nats, float32.

    Attributes:
        kept: [G] kept token indices of the best mask ever seen, ascending; the label of the published recipe.
        loss: its loss.
        first_best: lowest loss of the first population (of a warm start: of what it began from).
        trace: [rounds, 3] lowest and mean loss of each population, and the lowest loss so far. Row 0 is the
            first population, or the one stored by the search that is continued.
        population, losses: [P, G], [P] the last population.
        best: [G] genome of `kept`.
        evaluations: masks scored.
        saved: candidates that needed no scoring because they had been scored before.
        scored_kept, scored_losses: [evaluations, G], [evaluations] every mask scored, in order.
    """

    kept: np.ndarray
    loss: float
    first_best: float
    trace: np.ndarray
    population: np.ndarray
    losses: np.ndarray
    best: np.ndarray
    evaluations: int
    saved: int
    scored_kept: np.ndarray
    scored_losses: np.ndarray

    @property
    def warm_start(self) -> WarmStart:
        """From which `run` continues with further generations."""
        return WarmStart(self.population, self.losses, self.best, self.loss)


def run(
    strategy: Strategy,
    groups: Groups,
    score: Score,
    rng: np.random.Generator,
    generations: int,
    warm_start: WarmStart | None = None,
    prior: np.ndarray | None = None,
    patience: int = 0,
    remember: bool = True,
) -> SearchResult:
    """Search the masks of one sample.

    Args:
        strategy: how candidates are made.
        groups: groups of the sample's N visual tokens.
        score: the losses of masks; see `Score`.
        rng: see `genome.stream`.
        generations: populations after the first one (the paper's L). A warm start has its first one already.
        warm_start: continue the search that gave it: its stored losses are not scored again.
        prior: [N] token scores, higher is better, from which a share of the first population is drawn. In a
            warm start these seeds take the places of the worst of the stored population.
        patience: end after so many populations that brought no better mask; 0 = never.
        remember: score no mask twice. The losses are the same without, but for rounding.
    """
    if generations < 0:
        raise UserError(f"search needs generations of at least 0, got {generations}")
    memo = _Memo(groups, score, remember)
    trace = []
    if warm_start is None:
        state = strategy.start(groups, rng, prior=prior)
    else:
        state = _resume(strategy, groups, rng, warm_start, prior, memo)
    if state.losses is not None:
        trace.append((state.losses.min(), state.losses.mean(), state.best_loss))
    rounds = generations + 1 - len(trace)
    for _ in range(rounds):
        state, genomes = strategy.ask(state)
        losses = memo(genomes)
        state = strategy.tell(state, losses)
        trace.append((losses.min(), losses.mean(), state.best_loss))
        if patience and state.step - state.improved >= patience:
            break
    return _result(state, memo, np.array(trace, dtype=np.float32))


def _resume(
    strategy: Strategy,
    groups: Groups,
    rng: np.random.Generator,
    warm: WarmStart,
    prior: np.ndarray | None,
    memo: "_Memo",
) -> State:
    if prior is None:
        state = strategy.start(groups, rng, warm.population, warm.losses)
    else:
        ranked = truncation(warm.population, warm.losses, len(warm.population))
        state = strategy.start(groups, rng, ranked, prior=prior)
    memo.add(warm.population, warm.losses)
    memo.add(warm.best[None], np.array([warm.best_loss], dtype=np.float32))
    if warm.best_loss < state.best_loss:
        state = replace(state, best=np.asarray(warm.best, dtype=np.int32), best_loss=float(warm.best_loss))
    return state


def _result(state: State, memo: "_Memo", trace: np.ndarray) -> SearchResult:
    scored = memo.scored or [np.empty((0, state.groups.count), dtype=np.int32)]
    losses = memo.losses or [np.empty(0, dtype=np.float32)]
    return SearchResult(
        kept=state.groups.kept(state.best),
        loss=state.best_loss,
        first_best=float(trace[0, 2]),
        trace=trace,
        population=state.population,
        losses=state.losses,
        best=state.best,
        evaluations=sum(map(len, losses)),
        saved=memo.saved,
        scored_kept=np.concatenate(scored),
        scored_losses=np.concatenate(losses),
    )


class _Memo:
    """Losses of genomes; scores those it has not seen."""

    def __init__(self, groups: Groups, score: Score, remember: bool = True) -> None:
        self.groups = groups
        self.score = score
        self.remember = remember
        self.known: dict[bytes, float] = {}
        self.scored: list[np.ndarray] = []
        self.losses: list[np.ndarray] = []
        self.saved = 0

    def add(self, genomes: np.ndarray, losses: np.ndarray) -> None:
        """Take in losses known from elsewhere."""
        losses = np.asarray(losses, dtype=np.float32).tolist()
        self.known.update(zip(genome_keys(genomes), losses, strict=True))

    def __call__(self, genomes: np.ndarray) -> np.ndarray:
        keys = genome_keys(genomes)
        if not self.remember:
            return self._scored(genomes)
        fresh = {key: row for row, key in enumerate(keys) if key not in self.known}
        self.saved += len(keys) - len(fresh)
        if fresh:
            losses = self._scored(genomes[list(fresh.values())])
            self.known.update(zip(fresh, losses.tolist(), strict=True))
        return np.array([self.known[key] for key in keys], dtype=np.float32)

    def _scored(self, genomes: np.ndarray) -> np.ndarray:
        kept = self.groups.kept(genomes)
        losses = np.asarray(self.score(kept), dtype=np.float32)
        assert losses.shape == (len(genomes),), f"score gave {losses.shape} for {len(genomes)} masks"
        if np.isnan(losses).any():
            raise UserError(
                "the MLLM gave a loss that is not a number: check the sample's answer, "
                "or score in bfloat16 or float32 instead of float16"
            )
        self.scored.append(kept)
        self.losses.append(losses)
        return losses
