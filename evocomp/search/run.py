"""Runs a search on one sample: asks the strategy for candidates, scores the new ones and tells it their losses."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from evocomp.grouping.groups import Groups
from evocomp.log import UserError
from evocomp.search.genome import keys as genome_keys
from evocomp.search.operators import truncation
from evocomp.search.strategy import State, Strategy

Score = Callable[[np.ndarray], np.ndarray]
"""Kept token indices [K, G] of K masks -> losses [K] float32. No mask is scored twice unless `remember` is False."""


@dataclass(frozen=True, eq=False)
class WarmStart:
    """State from which a later search of the same sample continues.

    Attributes:
        population: [P, G] genomes.
        losses: [P] their losses, float32.
        best: [G] best genome so far, with its loss `best_loss`; it may be absent from the population.
    """

    population: np.ndarray
    losses: np.ndarray
    best: np.ndarray
    best_loss: float


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Result of a search. Losses are mean answer losses [nats], float32.

    Attributes:
        kept: [G] kept token indices of the best mask, ascending; the label of the published recipe.
        loss: its loss.
        first_best: lowest loss of the first population; after a warm start, of the stored population.
        trace: [rounds, 3] lowest and mean loss of each population, and the lowest loss so far. Row 0 is the
            first population, or the stored one that a warm start continues from.
        population, losses: [P, G], [P] the last population.
        best: [G] genome of `kept`.
        evaluations: number of scored masks.
        saved: number of candidates that were not scored because they had been scored before.
        scored_kept, scored_losses: [evaluations, G], [evaluations] all scored masks, in order.
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
        """State from which `run` continues with further generations."""
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
        strategy: makes the candidates.
        groups: groups of the sample's N visual tokens.
        score: computes losses of masks; see `Score`.
        rng: see `genome.stream`.
        generations: number of populations after the first one (L in the paper). A warm start already has the first one.
        warm_start: state of an earlier search to continue; its stored losses are not computed again.
        prior: [N] token scores, higher is better, from which a fraction of the first population is drawn. In a warm
            start, the drawn genomes replace the worst ones of the stored population.
        patience: stop after this number of populations without improvement; 0: never.
        remember: score no mask twice. Without it, losses are the same up to rounding.
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
    """Losses of genomes, with a cache of the losses that are already known."""

    def __init__(self, groups: Groups, score: Score, remember: bool = True) -> None:
        self.groups = groups
        self.score = score
        self.remember = remember
        self.known: dict[bytes, float] = {}
        self.scored: list[np.ndarray] = []
        self.losses: list[np.ndarray] = []
        self.saved = 0

    def add(self, genomes: np.ndarray, losses: np.ndarray) -> None:
        """Add known losses to the cache."""
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
                "the MLLM's loss of a mask is NaN; check the sample's answer, "
                "or score in bfloat16 or float32 instead of float16"
            )
        self.scored.append(kept)
        self.losses.append(losses)
        return losses
