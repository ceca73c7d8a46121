"""Credit labels from the masks that a search scores, so that every search strategy can also make soft labels."""

from collections.abc import Iterator, Sequence

import numpy as np

from evocomp.labels.credit import CLIP, stored_credits
from evocomp.labels.hard import HardLabels
from evocomp.labels.labeller import Encode, Rounds, Scores
from evocomp.labels.records import Record


class SearchedCredits(Rounds):
    """One round of credits [N] per question, from all masks that its search has scored.

    A search keeps one token of each group. A token that is the only one of its group is therefore in every mask;
    nothing is known about it, and its credit is 0.

    Args:
        search: runs the searches.
        probabilities: store targets in (0, 1) for losses that expect retention probabilities, else credits.
    """

    def __init__(self, search: HardLabels, probabilities: bool):
        self.search = search
        self.probabilities = probabilities

    def chunks(self, round: int, previous: dict[int, Record]) -> list[list[int]]:
        """The chunks of the search labels."""
        return self.search.chunks(round, previous)

    def make(
        self,
        round: int,
        ids: Sequence[int],
        encode: Encode,
        previous: dict[int, Record],
        scores: Scores | None,
    ) -> Iterator[Record]:
        """Records of a chunk, one search per question."""
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
