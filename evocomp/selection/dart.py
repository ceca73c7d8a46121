"""DART: keep a few pivots and what resembles them least (arXiv 2502.11494; code ZichenWen1/DART)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector
from evocomp.selection.llm_attention import at_layer, visual_start
from evocomp.selection.similarity import cosine
from evocomp.selection.top_r import descending

K = 2
PIVOTS = 4


def dart_pivots(keys: Tensor, start: int, n: int, image: int = PIVOTS, text: int = PIVOTS) -> list[int]:
    """Pivots as places in the LLM's sequence, in the order in which they choose.

    keys [L, heads * head_dim] after rotation; visual tokens are places start..start+n-1, text is what
    follows. Pivots are the `image` and `text` tokens with the largest L1 norm (fewer where there are fewer).
    The published order, which changes the result, is the iteration order of a CPython set of these places;
    the same set is built here.
    """
    norm = keys.float().abs().sum(1)
    visual = (descending(norm[start : start + n])[:image] + start).tolist()
    words = (descending(norm[start + n :])[:text] + start + n).tolist()
    return list(set(visual + words))


def dart(hidden: Tensor, start: int, n: int, pivots: Sequence[int], takes: Sequence[int]) -> Tensor:
    """Ascending visual indices: the visual pivots, and for each pivot in turn the `takes` least like it.

    hidden [L, D]: output of the layer that gave the keys, after the LLM's final norm. A pivot takes the
    visual tokens of lowest cosine that are still free. Text pivots are not part of the result.
    """
    place = torch.tensor(pivots, device=hidden.device)
    likeness = cosine(hidden[place], hidden[start : start + n])
    taken = place[(place >= start) & (place < start + n)] - start
    for row, take in zip(likeness, takes, strict=True):
        free = row.index_fill(0, taken, math.inf)
        taken = torch.cat([taken, descending(-free)[:take]])
    return taken.sort().values


def published_takes(budget: int, n: int, pivots: int) -> list[int]:
    """floor(budget / 8) for every pivot, so 4 + 8 floor(budget / 8) are kept, as far as `n` reaches."""
    take = min(budget // (2 * PIVOTS), max(0, n - PIVOTS) // (2 * PIVOTS))
    return [take] * pivots


def exact_takes(budget: int, pivots: int) -> list[int]:
    """`budget` tokens spread over the pivots, the first ones taking one more where it does not divide."""
    take, more = divmod(budget, pivots)
    return [take + (i < more) for i in range(pivots)]


@dataclass(frozen=True)
class DART(Selector):
    """Duplication-aware tokens. By default exactly `keep`: pivots share keep - 4 (our variant).

    `llm_keys` and `llm_hidden` are those of layer k - 1. Fewer than four text tokens or a budget under four
    only make fewer pivots.
    """

    name = "dart"
    needs = frozenset({"llm_keys", "llm_hidden", "text"})
    text_aware = True
    needs_llm = True
    source = "arXiv 2502.11494, github.com/ZichenWen1/DART"

    k: int = K
    """The published drop happens before this layer."""
    exact: bool = True
    """False: the published count, 4 + 8 floor(keep / 8): 196, 132, 68 for 192, 128, 64."""

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        n = len(inputs)
        keys, hidden = at_layer(inputs.llm_keys, self.k - 1), at_layer(inputs.llm_hidden, self.k - 1)
        start = visual_start(inputs, len(keys))
        image = min(PIVOTS, n, keep) if self.exact else min(PIVOTS, n)
        pivots = dart_pivots(keys, start, n, image)
        if self.exact:
            takes = exact_takes(keep - image, len(pivots))
        else:
            takes = published_takes(keep, n, len(pivots))
        return Selection.of(dart(hidden, start, n, pivots, takes), pivots=pivots)
