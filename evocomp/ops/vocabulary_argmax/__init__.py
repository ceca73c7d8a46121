"""Nearest vocabulary row by cosine, for the semantic groups of the paper (section 3.1)."""

from torch import Tensor

from evocomp.ops import dispatch
from evocomp.ops.vocabulary_argmax import reference


def vocabulary_argmax(
    tokens: Tensor, table: Tensor, mask: Tensor | None = None, chunk: int = 8192
) -> tuple[Tensor, Tensor]:
    """Nearest vocabulary row of each visual token by cosine, without an N x V matrix.

    By default the reference also runs on GPUs, because cuBLAS on chunks is faster than the kernel. The kernel needs
    less memory; EVOCOMP_OPS=triton selects it.

    Scores are computed in fp32 (fp64 for fp64 tokens). Ties go to the lowest row id. Rows of zero norm, rows with NaN
    and rows that `mask` excludes are never selected. Not differentiable.

    Args:
        tokens: [N, D] visual tokens, any floating dtype.
        table: [V, D] input embedding table.
        mask: [V] bool, True for allowed rows; None: all rows are allowed.
        chunk: number of vocabulary rows that the reference scores at a time; peak memory is N x chunk scores.

    Returns:
        index [N] int64 and cosine [N] (fp32, or fp64). If no row is allowed: index 0, cosine -inf.
    """
    assert tokens.ndim == table.ndim == 2 and tokens.shape[1] == table.shape[1], "tokens [N, D], table [V, D]"
    assert chunk >= 1
    if dispatch.choose(tokens, slower="vocabulary_argmax") == "triton":
        from evocomp.ops.vocabulary_argmax import triton

        return triton.vocabulary_argmax(tokens, table, mask)
    return reference.vocabulary_argmax(tokens, table, mask, chunk)
