"""Layer averages: the mean number of visual tokens per LLM layer when tokens are dropped between layers.

Papers use "192 tokens" both for the number of tokens in the LLM input and for this average; a table should print both.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A drop of visual tokens before one LLM layer."""

    before_layer: int
    """Index (0-based) of the first LLM layer that runs on the shorter sequence."""
    visual: int
    """Number of visual tokens from that layer on."""


def layer_average(n: int, stages: Sequence[Stage], layers: int = 32) -> float:
    """Visual tokens per layer, averaged over an LLM of `layers` layers with `n` visual tokens in its input.

    >>> layer_average(576, [Stage(before_layer=2, visual=144)], layers=32)
    171.0
    """
    total, now, since = 0, n, 0
    for stage in stages:
        total += now * (stage.before_layer - since)
        now, since = stage.visual, stage.before_layer
    return (total + now * (layers - since)) / layers
