"""The common form of everything that chooses visual tokens, and what it may be told of the prompt."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Pick(NamedTuple):
    """What is kept of one image of n tokens.

    kept:   kept tokens [r], ascending
    scores: scores [n] of all tokens, None if there are none
    owner:  the kept token [n] that each token is averaged into, None if kept tokens are no means
    tokens: new tokens [r, D] that stand in place of the kept ones, None if they stay as they are
    origin: with `tokens`: the token [r] whose position each of them takes
    """

    kept: Tensor
    scores: Tensor | None = None
    owner: Tensor | None = None
    tokens: Tensor | None = None
    origin: Tensor | None = None


class LLMInput(NamedTuple):
    """The batch of prompts that the images belong to, as it goes into the decoder.

    embeds:    input embeddings [B, S, D], visual tokens included
    text:      text that a selector may read, bool [B, S]
    visual:    visual tokens, bool [B, S]
    positions: position ids [B or 1, S] (more rows with M-RoPE), None: 0, 1, ...
    rows:      the row of each image
    indices:   where the tokens of each image stand in its row [n], ascending
    """

    embeds: Tensor
    text: Tensor
    visual: Tensor
    positions: Tensor | None
    rows: list[int]
    indices: list[Tensor]


class Picker(Protocol):
    """Optional: `reads_llm_input = True` gets `pick` a fourth argument `llm_input`; `merges = True` says that it
    returns new tokens; `watch()` returns hooks that live as long as the compression."""

    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int]) -> list[Pick]: ...


def top_r(scores: Tensor, r: int) -> Pick:
    """The r highest of scores [n], in original order, and the scores; of equals the earlier token stays."""
    order = torch.argsort(scores, descending=True, stable=True)
    return Pick(order[:r].sort().values, scores)


def nothing(visual: Tensor) -> Pick:
    """No token of an image."""
    return Pick(torch.zeros(0, dtype=torch.long, device=visual.device))


def name_of(selector) -> str:
    """What a selector or picker is called in messages."""
    return getattr(selector, "name", type(selector).__name__)
