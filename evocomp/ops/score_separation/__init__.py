"""Cosine separation of retained and discarded tokens, alone or fused with the classifier head."""

import torch
from torch import Tensor

from evocomp.ops import dispatch
from evocomp.ops.score_separation import reference


def _check(hidden: Tensor, retained: Tensor, valid: Tensor | None) -> None:
    assert hidden.ndim == 3 and retained.shape == hidden.shape[:2], "hidden [B, N, D], retained [B, N]"
    assert retained.dtype == torch.bool, "retained is a bool mask; threshold soft targets first"
    assert valid is None or (valid.shape == retained.shape and valid.dtype == torch.bool)


def score_separation(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, retained: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits of a linear classifier and the cosine separation of its input, in one pass over `hidden`.

    Args:
        hidden: [B, N, D] outputs of the compressor's layer, any floating dtype; computed in fp32 (fp64).
        weight: [D] classifier weight.
        bias: scalar (any shape of one element) or None.
        retained: [B, N] bool, the label: True is I1 (kept), False is I0 (discarded).
        valid: [B, N] bool; False for padding, which is in neither segment and gets logit 0 and gradient 0. Its values
            are ignored, including NaN.

    Returns:
        logits [B, N] and separation [B] (see `cosine_separation`), fp32 or fp64.
    """
    _check(hidden, retained, valid)
    assert weight.shape == hidden.shape[2:], "weight [D]"
    if dispatch.choose(hidden) == "triton":
        from evocomp.ops.score_separation import triton

        return triton.score_separation(hidden, weight, bias, retained, valid)
    return reference.score_separation(hidden, weight, bias, retained, valid)


def cosine_separation(hidden: Tensor, retained: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean cosine over all pairs of a discarded and a retained token of the same sample (CS in the paper).

    The mean over pairs equals the inner product of the two segments' mean unit vectors: O(N D) instead of O(N^2 D).

    Args:
        hidden, retained, valid: as in `score_separation`.

    Returns:
        separation [B] in [-1, 1], fp32 or fp64; 0 with zero gradient if a segment is empty.
    """
    _check(hidden, retained, valid)
    if dispatch.choose(hidden) == "triton":
        from evocomp.ops.score_separation import triton

        return triton.cosine_separation(hidden, retained, valid)
    return reference.cosine_separation(hidden, retained, valid)
