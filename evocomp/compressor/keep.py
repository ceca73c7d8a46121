"""From scores to what the LLM reads: which tokens are selected, and what becomes of the others.

The highest are taken of the scores, or of a spread-out draw from the policy that they stand for.

The listwise loss and the policy gradient train a distribution of masks (Plackett-Luce), of which the r highest scores
are the mode only. Where many tokens are nearly equal, the mode takes a clump of them, and a sample takes some from
everywhere. A sample without chance: Gumbel noise (Gumbel top-r, arXiv 1903.06059) whose quantiles are spread over the
tokens by steps of the golden ratio, so that any run of neighbours has high and low ones. Ours.
"""

import torch
from torch import Tensor

from evocomp.compressor.config import EvoCompConfig
from evocomp.mllm.context import Shown, shown, split
from evocomp.selection.top_r import top_r

GOLDEN = (5**0.5 - 1) / 2


def dither(count: int) -> Tensor:
    """Fixed noise [count] float32 that follows the standard Gumbel distribution as evenly as can be.

    >>> noise = dither(1000)  # its mean is Euler's constant, 0.577
    >>> round(float(noise.mean()), 2), bool((noise[:500].mean() - noise[500:].mean()).abs() < 0.02)
    (0.58, True)
    """
    quantiles = (torch.arange(count, dtype=torch.float64) * GOLDEN + 0.5) % 1
    return -torch.log(-torch.log(quantiles.clamp(1e-6, 1 - 1e-6))).float()


def selected_count(keep: int, total: int, config: EvoCompConfig) -> int:
    """How many of `keep` tokens of a picture of `total` are selected by score: the budget that a compressor is told."""
    return split(min(keep, total), total, config.sharp)[0]


def selected_tokens(logits: Tensor, keep: int, config: EvoCompConfig) -> tuple[Tensor, int]:
    """What a compressor of this configuration makes of `keep` tokens (or all n, if there are fewer) of one picture.

    Returns:
        The selected tokens as ascending indices: the highest of its logits [n] plus dither; and how many context
        tokens stand beside them.
    """
    total = len(logits)
    selected, context = split(min(keep, total), total, config.sharp)
    if config.dither:
        logits = logits + config.dither * dither(total).to(logits.device)
    return top_r(logits, selected), context


def shown_tokens(logits: Tensor, visual: Tensor, keep: int, config: EvoCompConfig) -> Shown:
    """The `keep` tokens (or all n, if there are fewer) that the LLM reads of one picture: those that a compressor of
    this configuration selects by its logits [n], and its context tokens. visual: [n, D]."""
    selected, context = selected_tokens(logits, keep, config)
    return shown(visual, selected.to(visual.device), context)
