"""Credits: what each visual token is worth, by the losses of the masks that keep it. Ours.

One best mask is an arbitrary pick wherever the loss hardly depends on the token; the whole scored population
says how much each token matters, at no further forward.
"""

from collections.abc import Sequence

import numpy as np

from evocomp.grouping import Groups
from evocomp.log import UserError

CLIP = 6.0
"""Losses in nats above this count as this: one failed mask must not outweigh all the others."""

SOFTENING = 0.1
"""Added to the standard deviation in nats, so that questions on which no mask matters get small credits."""


def random_masks(num_tokens: int, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Masks that keep `size` of the tokens, all subsets equally likely: [count, size] ascending int32."""
    if not 1 <= size <= num_tokens:
        raise UserError(f"masks of {size} tokens do not fit an image of {num_tokens}; choose smaller sizes")
    draws = rng.random((count, num_tokens))
    return np.sort(np.argpartition(draws, size - 1, axis=1)[:, :size], axis=1).astype(np.int32)


Arrays = Sequence[np.ndarray]


def credits(masks: Arrays, losses: Arrays, num_tokens: int) -> np.ndarray:
    """Credits z of N tokens for J questions that share their masks: [J, N] float32, higher is better.

    Per size r: z_i = -(sum of l' over the masks that keep i) / (c_i (std + 0.1)), with l' the loss clipped at
    6 minus its mean, and c_i the number of masks that keep i; 0 where c_i = 0. Then the mean over the sizes.

    Args:
        masks: for each size r, [K, r] kept token indices.
        losses: for each size r, [J, K] answer losses in nats.
        num_tokens: N.

    Token 0 is in both of the masks with low losses, token 2 in both with high ones:

    >>> masks = np.array([[0, 1], [0, 3], [1, 2], [2, 3]])
    >>> np.sign(credits([masks], [np.array([[0.1, 0.2, 3.0, 3.1]])], 4)).tolist()
    [[1.0, 1.0, -1.0, -1.0]]
    """
    parts = [_standardised(*pair, num_tokens) for pair in zip(masks, losses, strict=True)]
    return np.mean([gains / np.maximum(counts, 1) for gains, counts in parts], axis=0).astype(np.float32)


def marginal_credits(masks: Arrays, losses: Arrays, num_tokens: int) -> np.ndarray:
    """As `credits`, in standard errors instead of standard deviations: [J, N] float32.

    Each size's z_i is scaled by sqrt(c_i); the sizes are summed and divided by the root of their number. So
    a token that was kept more often, and is known better, stands out more. `marginal_targets` makes soft
    labels of them. The masks that a search has scored serve as well: masks [result.scored_kept] and losses
    [result.scored_losses[None]]; a token that all of them keep gets 0, for nothing is known about it.
    """
    parts = [_standardised(*pair, num_tokens) for pair in zip(masks, losses, strict=True)]
    total = np.sum([gains / np.sqrt(np.maximum(counts, 1)) for gains, counts in parts], axis=0)
    return (total / np.sqrt(len(parts))).astype(np.float32)


def marginal_targets(credits: np.ndarray) -> np.ndarray:
    """Soft labels in (0, 1) for losses that expect retention probabilities: sigmoid(z - 2), any shape."""
    # two standard errors: a token is to be kept when its worth is beyond doubt
    return (0.5 * (1 + np.tanh(0.5 * (np.asarray(credits, dtype=np.float64) - 2.0)))).astype(np.float32)


def group_means(credits: np.ndarray, groups: Groups) -> np.ndarray:
    """Every token's credit replaced by the mean over its group: [J, N] -> [J, N] float32.

    A token of 576 is in one of nine masks at most, so that its own credit is mostly noise: of few masks, what is
    known is what tokens of one meaning are worth together. Unbiased for the group, with 1/size of the variance.

    >>> group_means(np.array([[4.0, 1.0, 0.0, 5.0]]), Groups.from_ids([0, 1, 0, 1])).tolist()
    [[2.0, 3.0, 2.0, 3.0]]
    """
    totals = np.zeros((len(credits), groups.count))
    np.add.at(totals.T, groups.of, np.asarray(credits).T)
    return (totals / groups.sizes)[:, groups.of].astype(np.float32)


def stored_credits(
    masks: Arrays, losses: Arrays, num_tokens: int, probabilities: bool, groups: Groups | None = None
) -> np.ndarray:
    """What a label store keeps for J questions [J, N] float16: `marginal_targets` for losses that expect
    probabilities, else `credits`, `group_means` of them if there are groups."""
    if probabilities:
        return marginal_targets(marginal_credits(masks, losses, num_tokens)).astype(np.float16)
    values = credits(masks, losses, num_tokens)
    return (values if groups is None else group_means(values, groups)).astype(np.float16)


def _standardised(masks: np.ndarray, losses: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Summed gain of the masks that keep each token, in deviations [J, N], and their number [N]."""
    losses = np.minimum(np.asarray(losses, dtype=np.float64), CLIP)
    count, size = masks.shape
    assert losses.ndim == 2 and losses.shape[1] == count, f"losses {losses.shape} for {count} masks"
    deviation = losses.std(axis=1, ddof=1, keepdims=True) if count > 1 else np.zeros((len(losses), 1))
    gains = (losses.mean(axis=1, keepdims=True) - losses) / (deviation + SOFTENING)
    keeps = np.zeros((count, num_tokens))
    keeps[np.arange(count)[:, None], masks] = 1
    return gains @ keeps, keeps.sum(0)
