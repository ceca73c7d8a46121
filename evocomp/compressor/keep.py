"""From scores to kept tokens: top-r selection with optional deterministic noise, priority order and context tokens.

The listwise loss and the policy gradient train a distribution of masks (Plackett-Luce). The r highest scores are only
its mode: where many tokens have nearly equal scores, the mode selects neighbouring tokens, and a sample spreads over
the image. `dither` gives a deterministic sample: Gumbel noise (Gumbel top-r, arXiv 1903.06059) whose quantiles advance
by the golden ratio from token to token, so that neighbours get high and low noise. This is not part of the paper.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from evocomp.compressor.config import EvoCompConfig
from evocomp.mllm.context import Shown, shown, split
from evocomp.selection.priority import GOLDEN, fill
from evocomp.selection.top_r import top_r


def dither(count: int) -> Tensor:
    """Fixed noise [count] float32 that follows the standard Gumbel distribution evenly (low discrepancy).

    >>> noise = dither(1000)  # its mean is Euler's constant, 0.577
    >>> round(float(noise.mean()), 2), bool((noise[:500].mean() - noise[500:].mean()).abs() < 0.02)
    (0.58, True)
    """
    quantiles = (torch.arange(count, dtype=torch.float64) * GOLDEN + 0.5) % 1
    return -torch.log(-torch.log(quantiles.clamp(1e-6, 1 - 1e-6))).float()


class Budget(NamedTuple):
    """Composition of the R kept tokens of an image.

    scored: number of tokens chosen by the compressor's scores
    filled: number of tokens chosen by a training-free order among the rest
    context: number of context tokens, which are means of dropped tokens
    """

    scored: int
    filled: int
    context: int


def budget(keep: int, total: int, config: EvoCompConfig) -> Budget:
    """Divide `keep` tokens (at most N) according to the configuration; at least one token is scored.

    >>> budget(16, 144, EvoCompConfig(sharp=1 / 4, hedge=1 / 2))
    Budget(scored=6, filled=5, context=5)
    """
    return hedged(*split(min(keep, total), total, config.sharp), config.hedge)


def hedged(selected: int, context: int, hedge: float) -> Budget:
    """Divide the selected tokens between scores and training-free order."""
    filled = int(hedge * selected)
    return Budget(selected - filled, filled, context)


def selected_count(keep: int, total: int, config: EvoCompConfig) -> int:
    """Number of tokens that are chosen by score, which is the budget input of the compressor."""
    return budget(keep, total, config).scored


def selected_tokens(
    logits: Tensor, keep: int, config: EvoCompConfig, priority: Tensor | None = None
) -> tuple[Tensor, int]:
    """Select tokens of one image, given the logits of a compressor and `keep`, the number of kept tokens (at most N).

    Args:
        logits: [N] scores.
        priority: [N] order for `config.hedge`, see `evocomp.selection.priority`; required if that is above 0.

    Returns:
        The selected tokens as ascending indices (the highest logits plus dither, and the first of the priority order
        among the others), and the number of context tokens in addition.
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
    """The `keep` tokens (at most N) of one image [N, D] that enter the LLM; see `selected_tokens`."""
    selected, context = selected_tokens(logits, keep, config, priority)
    return shown(visual, selected.to(visual.device), context)
