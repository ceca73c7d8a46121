"""Credit labels from random masks of fixed sizes, which are scored for all questions about an image together."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from evocomp.config.schema import LabelConfig
from evocomp.data.example import Example, stable_id
from evocomp.grouping.build import Grouper
from evocomp.labels.credit import CLIP, random_masks, stored_credits
from evocomp.labels.labeller import Encode, Rounds, Scores
from evocomp.labels.records import Record
from evocomp.mllm.features import Features
from evocomp.scoring.answer_losses import shares_prefix
from evocomp.scoring.scorer import CandidateScorer
from evocomp.search.genome import stream


class CreditLabels(Rounds):
    """One round of credits [N] per question. Not in the paper; much cheaper than the published search.

    Args:
        examples: the samples, in order; those about the same image are scored together.
        scorer: computes losses of masks.
        labels: settings of the labels.
        seed: seed of the masks.
        probabilities: store targets in (0, 1) for losses that expect retention probabilities, else credits.
        grouper: groups visual tokens, whose credits are averaged over each group; None: no averaging.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        scorer: CandidateScorer,
        labels: LabelConfig,
        seed: int,
        probabilities: bool,
        grouper: Grouper | None = None,
    ):
        self.examples = examples
        self.scorer = scorer
        self.labels = labels
        self.seed = seed
        self.probabilities = probabilities
        self.grouper = grouper

    def chunks(self, round: int, previous: dict[int, Record]) -> list[list[int]]:
        """Chunks that keep all questions about an image together, so that its masks are scored once."""
        found: list[list[int]] = [[]]
        for _, group in groupby(self.examples, key=lambda example: example.image_id):
            ids = [example.id for example in group]
            if found[-1] and len(found[-1]) + len(ids) > self.labels.chunk_size:
                found.append([])
            found[-1].extend(ids)
        return found

    def make(
        self,
        round: int,
        ids: Sequence[int],
        encode: Encode,
        previous: dict[int, Record],
        scores: Scores | None,
    ) -> Iterator[Record]:
        """Records of a chunk, image by image; the masks depend on the seed, the image and the round only."""
        for image_id, group in groupby(encode(ids), key=lambda features: features.image_id):
            questions = list(group)
            rng = stream(self.seed, stable_id("masks", image_id), round)
            tokens = len(questions[0].visual)
            masks = [random_masks(tokens, size, self.labels.credit_masks, rng) for size in self._sizes(tokens)]
            losses = [self._losses(questions, mask) for mask in masks]
            groups = self.grouper(questions[0].visual) if self.grouper else None
            values = stored_credits(masks, losses, tokens, self.probabilities, groups)
            yield from self._records(questions, losses, values)

    def _sizes(self, tokens: int) -> list[int]:
        return mask_sizes(self.labels.credit_sizes, tokens)

    def _losses(self, questions: list[Features], masks: np.ndarray) -> np.ndarray:
        """Losses [J, K]; the questions are packed into one sequence per mask if their prompts share the prefix."""
        if shares_prefix(questions):
            return self.scorer.shared(questions, masks)
        return np.stack([self.scorer(one, masks) for one in questions])

    def _records(
        self, questions: Sequence[Features], losses: Sequence[np.ndarray], values: np.ndarray
    ) -> Iterator[Record]:
        everything = np.concatenate(losses, axis=1)
        for row, one in enumerate(questions):
            yield {
                "id": one.id,
                "credits": values[row],
                "best_loss": np.float32(everything[row].min()),
                "first_mean": np.float32(everything[row].mean()),
                "spread": np.float32(np.minimum(everything[row], CLIP).std()),
                "evaluations": np.int32(everything.shape[1]),
            }


def mask_sizes(sizes: Sequence[float], tokens: int) -> list[int]:
    """Mask sizes for N tokens: values from 1 on are counts, values below 1 fractions of N; at most N.

    >>> mask_sizes([8, 0.25, 500], tokens=144)
    [8, 36, 144]
    """
    return [min(tokens, int(size) if size >= 1 else max(1, round(size * tokens))) for size in sizes]
