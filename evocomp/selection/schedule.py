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


def kept_for_average(n: int, average: float, before_layer: int, layers: int = 32) -> int:
    """Number of tokens to keep in a single drop before a layer, for the layer average nearest to `average`.

    For 192, 128 and 64 it is 166, 98 and 30 of 576 tokens before layer 2. Raises ValueError if the layers before the
    drop alone exceed `average`.
    """
    kept = round((average * layers - n * before_layer) / (layers - before_layer))
    if not 1 <= kept <= n:
        raise ValueError(f"no drop of {n} tokens before layer {before_layer} of {layers} gives an average of {average}")
    return kept
