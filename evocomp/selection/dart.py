"""DART: keep a few pivot tokens and the tokens least similar to them (arXiv 2502.11494; code ZichenWen1/DART)."""

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
    """Indices of the pivots in the LLM's sequence, in the order in which they select tokens.

    keys [L, heads * head_dim] after RoPE; the visual tokens have the indices start..start+n-1, text follows. Pivots are
    the `image` visual tokens and the `text` text tokens whose keys have the largest L1 norm (fewer if there are fewer).
    In the published code their order, which affects the result, is the iteration order of a CPython set of the indices;
    the same set is built here.
    """
    norm = keys.float().abs().sum(1)
    visual = (descending(norm[start : start + n])[:image] + start).tolist()
    words = (descending(norm[start + n :])[:text] + start + n).tolist()
    return list(set(visual + words))


def dart(hidden: Tensor, start: int, n: int, pivots: Sequence[int], takes: Sequence[int]) -> Tensor:
    """Ascending indices of the kept visual tokens: the visual pivots, and tokens that each pivot selects in turn.

    hidden [L, D]: output of the layer that the keys come from, after the LLM's final norm. Pivot i selects the takes[i]
    remaining visual tokens with the lowest cosine to it. Text pivots are not part of the result.
    """
    place = torch.tensor(pivots, device=hidden.device)
    likeness = cosine(hidden[place], hidden[start : start + n])
    taken = place[(place >= start) & (place < start + n)] - start
    for row, take in zip(likeness, takes, strict=True):
        free = row.index_fill(0, taken, math.inf)
        taken = torch.cat([taken, descending(-free)[:take]])
    return taken.sort().values


def published_takes(budget: int, n: int, pivots: int) -> list[int]:
    """floor(budget / 8) tokens for every pivot, so that 4 + 8 floor(budget / 8) tokens are kept, at most `n`."""
    take = min(budget // (2 * PIVOTS), max(0, n - PIVOTS) // (2 * PIVOTS))
    return [take] * pivots


def exact_takes(budget: int, pivots: int) -> list[int]:
    """`budget` tokens divided among the pivots; the first ones get one more if it is not divisible."""
    take, more = divmod(budget, pivots)
    return [take + (i < more) for i in range(pivots)]


@dataclass(frozen=True)
class DART(Selector):
    """DART. By default it keeps exactly `keep` tokens: the pivots share keep - 4 tokens (our variant).

    `llm_keys` and `llm_hidden` come from layer k - 1. With fewer than four text tokens, or a budget below four, there
    are fewer pivots.
    """

    name = "dart"
    needs = frozenset({"llm_keys", "llm_hidden", "text"})
    text_aware = True
    needs_llm = True
    source = "arXiv 2502.11494, github.com/ZichenWen1/DART"

    k: int = K
    """The published code drops tokens before this layer."""
    exact: bool = True
    """Whether to keep exactly `keep` tokens. False: the published number, 4 + 8 floor(keep / 8): 196, 132, 68 for 192,
    128, 64."""

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
