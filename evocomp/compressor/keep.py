"""From scores to what the LLM reads: which tokens are selected, and what becomes of the others.

The highest are taken of the scores, or of a spread-out draw from the policy that they stand for.

The listwise loss and the policy gradient train a distribution of masks (Plackett-Luce), of which the r highest scores
are the mode only. Where many tokens are nearly equal, the mode takes a clump of them, and a sample takes some from
everywhere. A sample without chance: Gumbel noise (Gumbel top-r, arXiv 1903.06059) whose quantiles are spread over the
tokens by steps of the golden ratio, so that any run of neighbours has high and low ones. Ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from evocomp.compressor.config import EvoCompConfig
from evocomp.mllm.context import Shown, shown, split
from evocomp.selection.priority import GOLDEN, fill
from evocomp.selection.top_r import top_r


def dither(count: int) -> Tensor:
    """Fixed noise [count] float32 that follows the standard Gumbel distribution as evenly as can be.

    >>> noise = dither(1000)  # its mean is Euler's constant, 0.577
    >>> round(float(noise.mean()), 2), bool((noise[:500].mean() - noise[500:].mean()).abs() < 0.02)
    (0.58, True)
    """
    quantiles = (torch.arange(count, dtype=torch.float64) * GOLDEN + 0.5) % 1
    return -torch.log(-torch.log(quantiles.clamp(1e-6, 1 - 1e-6))).float()


class Budget(NamedTuple):
    """How the R kept tokens of an image are made up.

    scored: chosen by the compressor's scores
    filled: chosen by a training-free order among the rest
    context: means of what is dropped
    """

    scored: int
    filled: int
    context: int


def budget(keep: int, total: int, config: EvoCompConfig) -> Budget:
    """Divide `keep` tokens (or all N, if there are fewer) as this configuration says; one token at least is scored.

    >>> budget(16, 144, EvoCompConfig(sharp=1 / 4, hedge=1 / 2))
    Budget(scored=6, filled=5, context=5)
    """
    return hedged(*split(min(keep, total), total, config.sharp), config.hedge)


def hedged(selected: int, context: int, hedge: float) -> Budget:
    """Divide so many selected tokens between scores and order."""
    filled = int(hedge * selected)
    return Budget(selected - filled, filled, context)


def selected_count(keep: int, total: int, config: EvoCompConfig) -> int:
    """Number of tokens that are chosen by score: the budget that a compressor is told."""
    return budget(keep, total, config).scored


def selected_tokens(
    logits: Tensor, keep: int, config: EvoCompConfig, priority: Tensor | None = None
) -> tuple[Tensor, int]:
    """What a compressor of this configuration makes of `keep` tokens (or all N, if there are fewer) of one image.

    Args:
        logits: [N] scores.
        priority: [N] order for `config.hedge`, see `evocomp.selection.priority`; needed if that is above 0.

    Returns:
        The selected tokens as ascending indices: the highest of the logits plus dither, and the first of the priority
        order among the others; and the number of context tokens beside them.
    """
    total = len(logits)
    scored, filled, context = budget(keep, total, config)
    if config.dither:
        logits = logits + config.dither * dither(total).to(logits.device)
    chosen = top_r(logits, scored)
    if filled:
        chosen = torch.cat([chosen, fill(chosen, priority.to(chosen.device), filled)]).sort().values
    return chosen, context


def shown_tokens(
    logits: Tensor, visual: Tensor, keep: int, config: EvoCompConfig, priority: Tensor | None = None
) -> Shown:
    """The `keep` tokens (or all N, if there are fewer) the LLM reads of one image [N, D]; see `selected_tokens`."""
    selected, context = selected_tokens(logits, keep, config, priority)
    return shown(visual, selected.to(visual.device), context)
