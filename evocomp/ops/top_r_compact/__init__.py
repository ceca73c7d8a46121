"""Gathers the R best-scored tokens in their original order, without host synchronisation."""

from typing import NamedTuple

from torch import Tensor

from evocomp.log import UserError
from evocomp.ops import dispatch
from evocomp.ops.top_r_compact import reference


class Compacted(NamedTuple):
    """The kept tokens of each image in original order."""

    index: Tensor
    """[B, R] int64, ascending indices among the N tokens."""
    embeddings: Tensor
    """[B, R, D]"""
    position_ids: Tensor | None
    """[B, R], or [C, B, R] for C rows of multi-axis rotary positions."""
    mask: Tensor | None
    """[B, R] bool: False for padding, which an image with fewer than R tokens contains."""


def top_r_compact(
    scores: Tensor,
    r: int,
    embeddings: Tensor,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> Compacted:
    """Keep the r best-scored tokens of each image, in their original order and with their original position ids.

    Output shapes depend on r only, so nothing is copied to the host (safe in CUDA graphs). Ties go to the lowest index;
    a NaN score counts as -inf; padding is kept only if an image has fewer than r tokens.

    Args:
        scores: [B, N]; they get no gradient.
        r: number of tokens to keep, 1 <= r <= N.
        embeddings: [B, N, D]; gradients flow to the kept rows.
        position_ids: [B, N], or [C, B, N] (C = 3 or 4 rows of M-RoPE), or None.
        mask: [B, N] bool, False for padding; None: no padding.

    Returns:
        Compacted(index, embeddings, position_ids, mask); each of the last two is None if its argument is None.

    Raises:
        UserError: r outside 1..N.
    """
    assert scores.ndim == 2 and embeddings.shape[:2] == scores.shape, "scores [B, N], embeddings [B, N, D]"
    if not 1 <= r <= scores.shape[1]:
        raise UserError(f"cannot keep {r} of {scores.shape[1]} tokens; choose a number from 1 to {scores.shape[1]}")
    if dispatch.choose(scores) == "triton":
        from evocomp.ops.top_r_compact import triton as backend
    else:
        backend = reference
    index = backend.top_r_index(scores, r, mask)
    return Compacted(
        index,
        backend.gather_embeddings(embeddings, index),
        None if position_ids is None else reference.gather_rows(position_ids, index),
        None if mask is None else reference.gather_rows(mask, index),
    )
