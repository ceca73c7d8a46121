"""When an LLM drops visual tokens layer by layer: how many it has processed on average.

"192 tokens" is said both of the count at the LLM's door and of this average; a table should print both.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """From one layer on, fewer visual tokens."""

    before_layer: int
    """First LLM layer (0-based) that runs on the shorter sequence."""
    visual: int
    """Visual rows from there on."""


def layer_average(n: int, stages: Sequence[Stage], layers: int = 32) -> float:
    """Visual tokens per layer, averaged over an LLM of `layers` layers, `n` at its door; stages in order.

    >>> layer_average(576, [Stage(before_layer=2, visual=144)], layers=32)
    171.0
    """
    total, now, since = 0, n, 0
    for stage in stages:
        total += now * (stage.before_layer - since)
        now, since = stage.visual, stage.before_layer
    return (total + now * (layers - since)) / layers
