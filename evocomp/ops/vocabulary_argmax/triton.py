"""Nearest vocabulary row by cosine as one GEMM whose epilogue is a running argmax."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evocomp.ops import dispatch


@triton.jit
def _argmax_kernel(
    tokens,
    table,
    mask,
    best,
    index,
    N,
    V,
    D,
    rows_per_split,
    stride_token,
    stride_token_d,
    stride_row,
    stride_row_d,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Best row of one slice of the vocabulary for BLOCK_N tokens; best, index: [splits, N]."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    token_rows = tokens + n.to(tl.int64)[:, None] * stride_token
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    at = tl.zeros([BLOCK_N], tl.int64)
    first = split * rows_per_split
    for start in range(first, min(first + rows_per_split, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        table_rows = table + v.to(tl.int64)[None, :] * stride_row
        product = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        square = tl.zeros([BLOCK_V], tl.float32)
        for d_start in range(0, D, BLOCK_D):
            column = d_start + d
            x = tl.load(
                token_rows + column[None, :] * stride_token_d,
                mask=(n < N)[:, None] & (column < D)[None, :],
                other=0.0,
            )
            e = tl.load(
                table_rows + column[:, None] * stride_row_d,
                mask=(v < V)[None, :] & (column < D)[:, None],
                other=0.0,
            )
            wide = e.to(tl.float32)
            square += tl.sum(wide * wide, axis=0)
            if UPCAST:
                product = tl.dot(x.to(tl.float32), wide, product, input_precision="ieee")
            else:
                product = tl.dot(x, e, product, input_precision="ieee")
        allowed = square > 0  # False for zero rows, NaN rows and rows beyond V
        if HAS_MASK:
            allowed = allowed & (tl.load(mask + v, mask=v < V, other=0) != 0)
        length = tl.sqrt(tl.where(allowed, square, 1.0))
        score = tl.where(allowed[None, :], product / length[None, :], -float("inf"))
        block_top, block_at = tl.max(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = block_top > top  # strict, so that ties between blocks go to the lowest id
        top = tl.where(better, block_top, top)
        at = tl.where(better, start + block_at.to(tl.int64), at)
    out = split.to(tl.int64) * N + n
    tl.store(best + out, top, mask=n < N)
    tl.store(index + out, at, mask=n < N)


def _blocks(itemsize: int) -> tuple[int, int, int]:
    """Tile size (tokens, rows, columns): full tensor-core tiles for 16-bit inputs, half of that for fp32 inputs."""
    if dispatch.interpreting():
        return 16, 32, 16  # the interpreter's time is proportional to the number of lanes
    return (128, 128, 64) if itemsize == 2 else (64, 64, 32)


def _splits(tokens: Tensor, token_blocks: int, row_blocks: int) -> int:
    """Number of vocabulary slices, so that few token blocks still fill the GPU (two programs per SM)."""
    if tokens.device.type != "cuda":
        return min(2, row_blocks)  # so that tests in the interpreter cover the merge
    programs = 2 * torch.cuda.get_device_properties(tokens.device).multi_processor_count
    return max(1, min(row_blocks, programs // token_blocks))


@torch.library.custom_op("evocomp::vocabulary_argmax", mutates_args=())
def vocabulary_argmax(tokens: Tensor, table: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `evocomp.ops.vocabulary_argmax`."""
    (n, d), v = tokens.shape, table.shape[0]
    common = torch.promote_types(tokens.dtype, table.dtype)  # tl.dot does not accept mixed dtypes
    tokens, table = tokens.to(common), table.to(common)
    block_n, block_v, block_d = _blocks(tokens.element_size())
    token_blocks, row_blocks = dispatch.blocks(n, block_n), dispatch.blocks(v, block_v)
    rows_per_split = block_v * dispatch.blocks(row_blocks, _splits(tokens, token_blocks, row_blocks))
    splits = dispatch.blocks(v, rows_per_split)
    best = torch.empty(splits, n, device=tokens.device)
    index = torch.empty(splits, n, dtype=torch.long, device=tokens.device)
    with dispatch.launch_on(tokens):
        _argmax_kernel[(token_blocks, splits)](
            tokens,
            table,
            tokens if mask is None else mask.contiguous(),
            best,
            index,
            n,
            v,
            d,
            rows_per_split,
            *tokens.stride(),
            *table.stride(),
            HAS_MASK=mask is not None,
            UPCAST=dispatch.interpreting(),  # the interpreter's tl.dot is wrong for bf16
            BLOCK_N=block_n,
            BLOCK_V=block_v,
            BLOCK_D=block_d,
            num_warps=8 if block_n == 128 else 4,  # with 4 the 128 x 128 products spill
        )
    top, split = best.max(dim=0)  # the first maximum is in the lowest slice, so ties still go to the lowest id
    norm = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32)
    cosine = torch.where(norm > 0, top / norm, top)
    return index.gather(0, split[None])[0], cosine


@vocabulary_argmax.register_fake
def _(tokens: Tensor, table: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    n = tokens.shape[0]
    return tokens.new_empty(n, dtype=torch.long), tokens.new_empty(n, dtype=torch.float32)
