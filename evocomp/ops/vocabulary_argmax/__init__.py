"""Nearest vocabulary row by cosine: the semantic groups of the paper (section 3.1)."""

from torch import Tensor

from evocomp.ops import dispatch
from evocomp.ops.vocabulary_argmax import reference


def vocabulary_argmax(
    tokens: Tensor, table: Tensor, mask: Tensor | None = None, chunk: int = 8192
) -> tuple[Tensor, Tensor]:
    """Row of the vocabulary that each visual token is nearest to by cosine, without the N x V matrix.

    The reference runs on GPUs too: cuBLAS by chunks is faster than the kernel, which needs the least memory of all
    and runs where EVOCOMP_OPS=triton asks for it.

    Scores are computed in fp32 (fp64 for fp64 tokens). Ties go to the lowest row id; rows of zero norm, rows
    with NaN and rows that `mask` excludes never win. Not differentiable.

    Args:
        tokens: [N, D] visual tokens, any floating dtype.
        table: [V, D] input embedding table.
        mask: [V] bool, True for the rows that may win; None allows all.
        chunk: vocabulary rows scored at a time by the reference; peak memory is N x chunk scores.

    Returns:
        index [N] int64 and cosine [N] (fp32, or fp64). Where no row may win: index 0, cosine -inf.
    """
    assert tokens.ndim == table.ndim == 2 and tokens.shape[1] == table.shape[1], "tokens [N, D], table [V, D]"
    assert chunk >= 1
    if dispatch.choose(tokens, slower="vocabulary_argmax") == "triton":
        from evocomp.ops.vocabulary_argmax import triton

        return triton.vocabulary_argmax(tokens, table, mask)
    return reference.vocabulary_argmax(tokens, table, mask, chunk)
