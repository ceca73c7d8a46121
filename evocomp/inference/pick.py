"""The interface of everything that selects visual tokens, and the prompt data that it may read."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Pick(NamedTuple):
    """The kept tokens of one image of n tokens.

    kept:   kept tokens [r], ascending
    scores: scores [n] of all tokens, None if there are none
    owner:  cluster assignment [n]: index of the kept token that each token is averaged into, None without averaging
    tokens: new tokens [r, D] that replace the kept ones, None if the kept ones are unchanged
    origin: with `tokens`: index [r] of the token whose position id each of them takes
    """

    kept: Tensor
    scores: Tensor | None = None
    owner: Tensor | None = None
    tokens: Tensor | None = None
    origin: Tensor | None = None


class LLMInput(NamedTuple):
    """The LLM input that the images belong to, a batch of prompts.

    embeds:    input embeddings [B, S, D], visual tokens included
    text:      mask of the text that a selector may read, bool [B, S]
    visual:    mask of the visual tokens, bool [B, S]
    positions: position ids [B or 1, S] (more rows with M-RoPE), None: 0, 1, ...
    rows:      row of each image
    indices:   indices [n] of the tokens of each image in its row, ascending
    """

    embeds: Tensor
    text: Tensor
    visual: Tensor
    positions: Tensor | None
    rows: list[int]
    indices: list[Tensor]


class Picker(Protocol):
    """Interface of a selector. Optional members: with `reads_llm_input = True`, `pick` gets a fourth argument
    `llm_input`; `merges = True` declares that it returns new tokens; `watch()` returns hooks that stay registered
    until the compression ends."""

    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int]) -> list[Pick]: ...


def top_r(scores: Tensor, r: int) -> Pick:
    """The r highest scores [n], in original order; of equal scores the earlier token is kept."""
    order = torch.argsort(scores, descending=True, stable=True)
    return Pick(order[:r].sort().values, scores)


def nothing(visual: Tensor) -> Pick:
    """A `Pick` that keeps no token of the image."""
    return Pick(torch.zeros(0, dtype=torch.long, device=visual.device))


def name_of(selector) -> str:
    """Name of a selector in messages."""
    return getattr(selector, "name", type(selector).__name__)
