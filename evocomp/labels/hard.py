"""Hard labels: the lowest-loss mask that a search finds for a sample (EvoComp, arXiv 2604.17087, Algorithm 1)."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from evocomp.config.schema import GroupingConfig, LabelConfig, SearchConfig
from evocomp.grouping.build import Grouper
from evocomp.grouping.groups import Groups
from evocomp.labels.labeller import Encode, Rounds, Scores, cut
from evocomp.labels.records import Record
from evocomp.mllm.features import Features
from evocomp.scoring.scorer import CandidateScorer
from evocomp.search.build import build_strategy
from evocomp.search.genome import random_genomes, stream
from evocomp.search.run import SearchResult, WarmStart, run


class HardLabels(Rounds):
    """Rounds of search labels: a sample's groups, its population, and the best mask found so far.

    Args:
        ids: ids of the samples, in order.
        scorer: computes losses of candidate masks.
        grouping, search, labels: sections of the settings.
        seed: seed of all random numbers.
        special_ids: rows of the vocabulary that are excluded if `grouping.mask_special`.
    """

    def __init__(
        self,
        ids: Sequence[int],
        scorer: CandidateScorer,
        grouping: GroupingConfig,
        search: SearchConfig,
        labels: LabelConfig,
        seed: int,
        special_ids: Sequence[int] = (),
    ):
        self.ids = ids
        self.scorer = scorer
        self.grouper = Grouper(grouping, scorer.mllm.vocabulary, special_ids)
        self.search = search
        self.labels = labels
        self.seed = seed
        self.strategy = build_strategy(search)

    def chunks(self, round: int, previous: dict[int, Record]) -> list[list[int]]:
        """The same chunks in every round."""
        return cut(self.ids, self.labels.chunk_size)

    def make(
        self,
        round: int,
        ids: Sequence[int],
        encode: Encode,
        previous: dict[int, Record],
        scores: Scores | None,
    ) -> Iterator[Record]:
        """Records of a chunk. Round 0 runs the full search; later rounds run further generations.

        A sample that the previous round skipped because its image is broken is skipped again.
        """
        encoded = encode([id for id in ids if round == 0 or id in previous])
        if round == 0:
            yield from map(self._first, encoded)
            return
        ranked: Sequence[np.ndarray | None] = [None] * len(encoded)
        if scores is not None and self.labels.warm_start == "scores":
            ranked = scores(encoded, None)
        for features, ranking in zip(encoded, ranked, strict=True):
            yield self._again(features, round, previous[features.id], ranking)

    def _first(self, features: Features) -> Record:
        full = self.scorer.full(features)
        if self.labels.target == "random":
            return self._random(self.groups(features), stream(self.seed, features.id, 0), features.id, full)
        groups, result = self.search_first(features)
        return self._record(features.id, groups, result, full, first_best=result.first_best)

    def search_first(self, features: Features) -> tuple[Groups, SearchResult]:
        """Groups of a sample, and the result of its first search."""
        groups = self.groups(features)
        prior = None if self.strategy.forward_only else self._prior(features, groups)
        rng = stream(self.seed, features.id, 0)
        return groups, self._run(features, groups, rng, self.search.generations, scores=prior)

    def _prior(self, features: Features, groups: Groups) -> np.ndarray:
        """Token scores [N] from one backward pass, with gates 1 / group size: one token's weight for each group."""
        gates = 1.0 / np.asarray(groups.sizes, dtype=np.float32)[groups.of]
        return -self.scorer.gate_gradient(features, gates)

    def _again(self, features: Features, round: int, previous: Record, scores: np.ndarray | None) -> Record:
        """Run further generations; given scores [N], first replace half of the population by masks drawn from them."""
        if self.labels.target == "random":
            return previous
        groups = Groups(previous["groups"])
        warm = WarmStart(
            previous["population"].astype(np.int32),
            previous["losses"],
            groups.genomes(previous["kept"].astype(np.int64)),
            previous["best_loss"],
        )
        rng = stream(self.seed, features.id, round)
        result = self._run(features, groups, rng, self.labels.generations_per_refresh, warm, scores)
        return self._record(features.id, groups, result, previous["full_loss"], previous["first_best"])

    def groups(self, features: Features) -> Groups:
        """Groups of the sample's visual tokens."""
        return self.grouper(features.visual)

    def _run(
        self,
        features: Features,
        groups: Groups,
        rng: np.random.Generator,
        generations: int,
        warm: WarmStart | None = None,
        scores: np.ndarray | None = None,
    ) -> SearchResult:
        options: dict[str, Any] = {"flips": True} if self.strategy.flips else {}
        score = partial(self.scorer, features, **options)
        patience, remember = self.search.patience, self.scorer.settings.memo
        return run(self.strategy, groups, score, rng, generations, warm, scores, patience, remember)

    def _random(self, groups: Groups, rng: np.random.Generator, id: int, full: float) -> Record:
        genome = random_genomes(groups.sizes, rng, 1)
        nothing = np.float32(np.nan)
        return {
            "id": id,
            "groups": groups.of.astype(np.uint16),
            "population": genome.astype(np.uint16),
            "losses": np.full(1, nothing, np.float32),
            "kept": groups.kept(genome[0]).astype(np.uint16),
            "best_loss": nothing,
            "first_best": nothing,
            "first_mean": nothing,
            "full_loss": np.float32(full),
            "evaluations": np.int32(0),
            "saved": np.int32(0),
        }

    @staticmethod
    def _record(id: int, groups: Groups, result: SearchResult, full: float, first_best: float) -> Record:
        return {
            "id": id,
            "groups": groups.of.astype(np.uint16),
            "population": result.population.astype(np.uint16),
            "losses": result.losses.astype(np.float32),
            "kept": result.kept.astype(np.uint16),
            "best_loss": np.float32(result.loss),
            "first_best": np.float32(first_best),
            "first_mean": np.float32(result.trace[0, 1]),
            "full_loss": np.float32(full),
            "evaluations": np.int32(result.evaluations),
            "saved": np.int32(result.saved),
        }
