"""On-policy rounds: the compressor proposes masks and the frozen MLLM scores them. Not in the paper.

A round draws samples by priority (the standard deviation of the losses of their last proposals). For each it draws K
masks by Gumbel top-r sampling from the compressor's scores, and stores the draws, their group-relative advantages and
their log-probabilities. The training step is then an ordinary loss on stored records.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from evocomp.compressor.keep import Budget, hedged
from evocomp.config.schema import LabelConfig
from evocomp.labels.credit import CLIP
from evocomp.labels.labeller import Encode, Rounds, Scores, cut
from evocomp.labels.random_credit import mask_sizes
from evocomp.labels.records import Record
from evocomp.log import UserError
from evocomp.losses import group_relative_advantages, plackett_luce_log_prob
from evocomp.mllm.context import split
from evocomp.mllm.features import Features
from evocomp.scoring.scorer import CandidateScorer
from evocomp.search.genome import stream
from evocomp.selection.priority import fill

CAP = 1.5
"""Maximum priority, also of a sample that was never scored [nats]."""

FLOOR = 0.03
"""Added to every priority, so that a sample with equal losses is still drawn again at times [nats]."""


class OnPolicyRounds(Rounds):
    """Round 0 holds labels of another kind; later rounds hold masks that the compressor proposed.

    Every round holds a record for every sample: {draws [K, r] in draw order, advantages [K], log_prob [K], spread}. The
    arrays are empty for samples that were not drawn in this round (their spread is copied) or whose losses hardly
    differ. A round depends on the previous round only.

    Args:
        first: rounds that make round 0.
        ids: ids of all training samples.
        scorer: computes losses of masks.
        labels: settings of the labels.
        seed: seed of all random numbers.
        sharp: maximum number of tokens drawn for a mask; the rest are context tokens (`evocomp.mllm.context.split`).
        hedge: fraction of them that is not drawn but taken from `Features.priority` (`evocomp.compressor.keep.hedged`).
    """

    def __init__(
        self,
        first: Rounds,
        ids: Sequence[int],
        scorer: CandidateScorer,
        labels: LabelConfig,
        seed: int,
        sharp: float = 0.0,
        hedge: float = 0.0,
    ):
        self.first = first
        self.ids = sorted(ids)
        self.scorer = scorer
        self.labels = labels
        self.seed = seed
        self.sharp = sharp
        self.hedge = hedge

    def chunks(self, round: int, previous: dict[int, Record]) -> list[list[int]]:
        """Chunks of the drawn samples, and a last chunk of all other samples."""
        if round == 0:
            return self.first.chunks(round, previous)
        drawn = self.draw(round, previous)
        taken = set(drawn)
        return [*cut(drawn, self.labels.chunk_size), [id for id in self.ids if id not in taken]]

    def to_score(self, round: int, chunks: Sequence[Sequence[int]]) -> list[int]:
        """The number of samples in each chunk; 0 for the last chunk, whose samples were not drawn."""
        if round == 0:
            return self.first.to_score(round, chunks)
        return [*(len(ids) for ids in chunks[:-1]), 0]

    def draw(self, round: int, previous: dict[int, Record]) -> list[int]:
        """Ids of this round's samples, drawn without replacement with weights priority + 0.03."""
        odds = np.array([self._priority(id, round, previous) for id in self.ids]) + FLOOR
        count = min(self.labels.samples_per_refresh, len(self.ids))
        # the `count` smallest of exponential variables with these rates: weighted sampling without replacement
        clocks = -np.log1p(-stream(self.seed, 0, round).random(len(self.ids))) / odds
        return [self.ids[i] for i in np.argsort(clocks, kind="stable")[:count]]

    def make(
        self,
        round: int,
        ids: Sequence[int],
        encode: Encode,
        previous: dict[int, Record],
        scores: Scores | None,
    ) -> Iterator[Record]:
        """Records of a chunk: proposals for the drawn samples, copies of the spread for the others."""
        if round == 0:
            yield from self.first.make(round, ids, encode, previous, scores)
            return
        sizes = self.sizes(round, previous)
        drawn = [id for id in ids if id in sizes]
        made = self._proposals(round, encode(drawn), sizes, scores) if drawn else {}
        yield from (made.get(id) or self._carried(id, self._priority(id, round, previous)) for id in ids)

    def sizes(self, round: int, previous: dict[int, Record]) -> dict[int, float]:
        """Mask size of each sample drawn in this round; the sizes in `labels.proposal_sizes` alternate."""
        choices = self.labels.proposal_sizes
        return {id: choices[i % len(choices)] for i, id in enumerate(self.draw(round, previous))}

    def _proposals(
        self, round: int, features: list[Features], sizes: dict[int, float], scores: Scores | None
    ) -> dict[int, Record]:
        """Records of the drawn samples, by id."""
        if scores is None:
            raise UserError(
                "labels.refresh=on_policy needs the compressor of a training run: evocomp label only makes round 0; "
                "run evocomp train"
            )
        splits = [self._split(one, sizes[one.id]) for one in features]
        logits = scores(features, [float(budget.scored) for budget in splits])
        made: dict[int, Record] = {}
        for budget in sorted(set(splits)):
            rows = [i for i, own in enumerate(splits) if own == budget]
            some = [features[i] for i in rows]
            made |= self._propose(round, some, [logits[i] for i in rows], budget)
        return made

    def _propose(
        self, round: int, features: list[Features], logits: list[np.ndarray], budget: Budget
    ) -> dict[int, Record]:
        """Draw and score K masks of one token budget for each sample, and compute advantages within the sample."""
        pairs = zip(features, logits, strict=True)
        draws = np.stack([self._sample(round, f.id, row, budget.scored) for f, row in pairs])
        masks, context = draws, budget.context
        if budget.filled:
            filled = [self._filled(own, one, budget.filled) for own, one in zip(draws, features, strict=True)]
            masks = np.concatenate([draws, np.stack(filled)], axis=-1)
        masks = np.sort(masks, axis=-1)
        first = self.labels.probes or self.labels.proposals
        losses = self.scorer.each(features, masks[:, :first], context)
        spreads = _spread(losses)
        records = {one.id: self._carried(one.id, spread) for one, spread in zip(features, spreads, strict=True)}
        differ = np.flatnonzero(spreads > self.labels.flat)
        if not len(differ):
            return records
        if first < self.labels.proposals:
            rest = self.scorer.each([features[row] for row in differ], masks[differ, first:], context)
            losses = np.concatenate([losses[differ], rest], axis=1)
        else:
            losses = losses[differ]
        spreads, advantages = _spread(losses), group_relative_advantages(torch.from_numpy(losses)).numpy()
        for place, row in enumerate(differ):
            one, own = features[row], draws[row]
            if spreads[place] <= self.labels.flat:
                records[one.id] = self._carried(one.id, spreads[place])
                continue
            log_prob = plackett_luce_log_prob(torch.from_numpy(logits[row])[None], torch.from_numpy(own)[None])[0]
            records[one.id] = {
                "id": one.id,
                "draws": own.astype(np.uint16),
                "advantages": advantages[place].astype(np.float32),
                "log_prob": log_prob.numpy().astype(np.float32),
                "spread": spreads[place],
            }
        return records

    def _split(self, features: Features, size: float) -> Budget:
        """Split the tokens of a sample's masks of that size into drawn (`scored`), `filled` and `context` tokens."""
        total = len(features.visual)
        return hedged(*split(mask_sizes([size], total)[0], total, self.sharp), self.hedge)

    @staticmethod
    def _filled(draws: np.ndarray, features: Features, count: int) -> np.ndarray:
        """The first tokens [K, count] of the sample's priority order that are not in each of its masks [K, r]."""
        assert features.priority is not None, "hedged masks need an order: set `FrozenMLLM.priority_by`"
        return fill(torch.from_numpy(draws), features.priority.cpu(), count).numpy()

    def _sample(self, round: int, id: int, logits: np.ndarray, size: int) -> np.ndarray:
        """K draws of `size` tokens without replacement, weights exp(logit): Gumbel top-r [K, r] in draw order."""
        uniform = stream(self.seed, id, round).random((self.labels.proposals, len(logits)))
        noise = -np.log(-np.log(np.clip(uniform, 1e-12, 1 - 1e-12)))
        return np.argsort(-(logits[None] + noise), axis=1, kind="stable")[:, :size]

    def _priority(self, id: int, round: int, previous: dict[int, Record]) -> float:
        """Spread of the sample's last proposals, at most `CAP`; `CAP` in the first on-policy round.

        It is 0 for a sample that the previous round skipped because its image is broken.
        """
        if round > 1 and id not in previous:
            return 0.0
        return CAP if round <= 1 else min(CAP, float(previous[id]["spread"]))

    def _carried(self, id: int, spread: float) -> Record:
        return {
            "id": id,
            "draws": np.zeros((0, 0), np.uint16),
            "advantages": np.zeros(0, np.float32),
            "log_prob": np.zeros(0, np.float32),
            "spread": np.float32(spread),
        }


def _spread(losses: np.ndarray) -> np.ndarray:
    """Standard deviation [B] of the clipped losses [B, K] of each sample's masks [nats]."""
    return np.minimum(losses, CLIP).std(axis=1, ddof=1).astype(np.float32)
