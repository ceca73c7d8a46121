"""Credits: the importance of each visual token, estimated from the losses of the masks that keep it. Not in the paper.

A label of one best mask is arbitrary for tokens on which the loss hardly depends. The losses of all scored masks
estimate how much each token matters, without further forward passes.
"""

from collections.abc import Sequence

import numpy as np

from evocomp.grouping import Groups
from evocomp.log import UserError

CLIP = 6.0
"""Losses are clipped at this value [nats], so that one failed mask does not outweigh all the others."""

SOFTENING = 0.1
"""Added to the standard deviation [nats], so that questions whose loss hardly depends on the mask get small credits."""


def random_masks(num_tokens: int, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Masks that keep `size` of the tokens, all subsets equally likely: [count, size] ascending int32."""
    if not 1 <= size <= num_tokens:
        raise UserError(f"masks of {size} tokens do not fit an image of {num_tokens} tokens; choose smaller sizes")
    draws = rng.random((count, num_tokens))
    return np.sort(np.argpartition(draws, size - 1, axis=1)[:, :size], axis=1).astype(np.int32)


Arrays = Sequence[np.ndarray]


def credits(masks: Arrays, losses: Arrays, num_tokens: int) -> np.ndarray:
    """Credits z of N tokens for J questions that share their masks: [J, N] float32, higher is better.

    For each mask size r, z_i = -(sum of l' over the masks that keep i) / (c_i (std + 0.1)), where l' is the loss,
    clipped at 6, minus its mean, and c_i is the number of masks that keep i; z_i = 0 if c_i = 0. The result is the mean
    over the sizes.

    Args:
        masks: for each size r, [K, r] kept token indices.
        losses: for each size r, [J, K] answer losses in nats.
        num_tokens: N.

    Token 0 is in the two masks with low losses, token 2 in the two masks with high losses:

    >>> masks = np.array([[0, 1], [0, 3], [1, 2], [2, 3]])
    >>> np.sign(credits([masks], [np.array([[0.1, 0.2, 3.0, 3.1]])], 4)).tolist()
    [[1.0, 1.0, -1.0, -1.0]]
    """
    parts = [_standardised(*pair, num_tokens) for pair in zip(masks, losses, strict=True)]
    return np.mean([gains / np.maximum(counts, 1) for gains, counts in parts], axis=0).astype(np.float32)


def marginal_credits(masks: Arrays, losses: Arrays, num_tokens: int) -> np.ndarray:
    """`credits` in units of standard errors instead of standard deviations: [J, N] float32.

    Each size's z_i is scaled by sqrt(c_i); the sum over the sizes is divided by the square root of their number. A
    token that more masks keep, and that is estimated more precisely, gets a larger value. `marginal_targets` turns the
    values into soft labels. The masks that a search has scored can be used too: masks [result.scored_kept] and losses
    [result.scored_losses[None]]. A token that all masks keep gets 0, because nothing is known about it.
    """
    parts = [_standardised(*pair, num_tokens) for pair in zip(masks, losses, strict=True)]
    total = np.sum([gains / np.sqrt(np.maximum(counts, 1)) for gains, counts in parts], axis=0)
    return (total / np.sqrt(len(parts))).astype(np.float32)


def marginal_targets(credits: np.ndarray) -> np.ndarray:
    """Soft labels in (0, 1) for losses that expect retention probabilities: sigmoid(z - 2), any shape."""
    # two standard errors: the target exceeds 1/2 only for tokens that are important with high confidence
    return (0.5 * (1 + np.tanh(0.5 * (np.asarray(credits, dtype=np.float64) - 2.0)))).astype(np.float32)


def group_means(credits: np.ndarray, groups: Groups) -> np.ndarray:
    """Replace every token's credit by the mean over its group: [J, N] -> [J, N] float32.

    With few masks, each of 576 tokens is in at most one of nine masks, so that its own credit is mostly noise. The mean
    over a group of similar tokens is an unbiased estimate for the group, with 1 / size of the variance.

    >>> group_means(np.array([[4.0, 1.0, 0.0, 5.0]]), Groups.from_ids([0, 1, 0, 1])).tolist()
    [[2.0, 3.0, 2.0, 3.0]]
    """
    totals = np.zeros((len(credits), groups.count))
    np.add.at(totals.T, groups.of, np.asarray(credits).T)
    return (totals / groups.sizes)[:, groups.of].astype(np.float32)


def stored_credits(
    masks: Arrays, losses: Arrays, num_tokens: int, probabilities: bool, groups: Groups | None = None
) -> np.ndarray:
    """Values that the label store keeps for J questions, [J, N] float16.

    They are `marginal_targets` if the training loss expects probabilities, else `credits`, averaged by `group_means` if
    there are groups.
    """
    if probabilities:
        return marginal_targets(marginal_credits(masks, losses, num_tokens)).astype(np.float16)
    values = credits(masks, losses, num_tokens)
    return (values if groups is None else group_means(values, groups)).astype(np.float16)


def _standardised(masks: np.ndarray, losses: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """For each token, over the masks that keep it: sum of (mean - loss) / (std + 0.1) [J, N], and their number [N]."""
    losses = np.minimum(np.asarray(losses, dtype=np.float64), CLIP)
    count, size = masks.shape
    assert losses.ndim == 2 and losses.shape[1] == count, f"losses {losses.shape} for {count} masks"
    deviation = losses.std(axis=1, ddof=1, keepdims=True) if count > 1 else np.zeros((len(losses), 1))
    gains = (losses.mean(axis=1, keepdims=True) - losses) / (deviation + SOFTENING)
    keeps = np.zeros((count, num_tokens))
    keeps[np.arange(count)[:, None], masks] = 1
    return gains @ keeps, keeps.sum(0)
