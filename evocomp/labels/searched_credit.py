"""Credit labels from the masks that a search scores anyway: every strategy serves for soft labels too."""

from collections.abc import Iterator, Sequence

import numpy as np

from evocomp.labels.credit import CLIP, stored_credits
from evocomp.labels.hard import HardLabels
from evocomp.labels.labeller import Encode, Rounds, Scores
from evocomp.labels.records import Record


class SearchedCredits(Rounds):
    """One round of credits [N] a question, of all the masks that its search has scored.

    A search keeps one token of each group, so a token that is alone in its group is in every mask: nothing is known
    about it, and its credit is 0.

    Args:
        search: makes the masks.
        probabilities: store targets in (0, 1) for losses that expect retention probabilities, else credits.
    """

    def __init__(self, search: HardLabels, probabilities: bool):
        self.search = search
        self.probabilities = probabilities

    def chunks(self, round: int, previous: dict[int, Record]) -> list[list[int]]:
        """Those of the search."""
        return self.search.chunks(round, previous)

    def make(
        self,
        round: int,
        ids: Sequence[int],
        encode: Encode,
        previous: dict[int, Record],
        scores: Scores | None,
    ) -> Iterator[Record]:
        """Question by question: groups and prompts differ."""
        for features in encode(ids):
            _, result = self.search.search_first(features)
            masks, losses = [result.scored_kept], [result.scored_losses[None]]
            values = stored_credits(masks, losses, len(features.visual), self.probabilities)
            yield {
                "id": features.id,
                "credits": values[0],
                "best_loss": np.float32(result.loss),
                "first_mean": np.float32(result.trace[0, 1]),
                "spread": np.float32(np.minimum(result.scored_losses, CLIP).std()),
                "evaluations": np.int32(result.evaluations),
            }
