"""The R best tokens without sorting: bitwise search for the R-th largest key, and prefix sums for the output slots."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evocomp.ops import dispatch

PADDING_KEY = tl.constexpr(1)  # below the key of -inf, above the key 0 of lanes beyond N


@triton.jit
def _index_kernel(scores, valid, index, N, R, stride_b, stride_n, HAS_VALID: tl.constexpr, BLOCK_N: tl.constexpr):
    """Computes index [B, R]: ascending indices of the R largest keys; ties go to the lowest index."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    score = tl.load(scores + b * stride_b + n * stride_n, mask=n < N, other=0.0).to(tl.float32)
    score = tl.where(score == score, score, -float("inf")) + 0.0  # NaN becomes -inf, -0.0 becomes 0.0
    # the bits of positive floats are in ascending order, those of negative floats in descending order
    bits = score.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    key = tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)
    if HAS_VALID:
        key = tl.where(tl.load(valid + b * N + n, mask=n < N, other=0) != 0, key, PADDING_KEY)
    key = tl.where(n < N, key, 0)
    threshold = tl.zeros([], tl.int64)  # becomes, bit by bit, the largest key that R tokens reach
    for step in range(32):
        candidate = threshold | (tl.full([], 1, tl.int64) << (31 - step))
        reached = tl.sum((key >= candidate).to(tl.int32))
        threshold = tl.where(reached >= R, candidate, threshold)
    above = key > threshold
    equal = key == threshold
    remaining = R - tl.sum(above.to(tl.int32))
    keep = above | (equal & (tl.cumsum(equal.to(tl.int32)) <= remaining))
    slot = tl.cumsum(keep.to(tl.int32)) - 1
    tl.store(index + b * R + slot, n.to(tl.int64), mask=keep)


@triton.jit
def _gather_kernel(embeddings, index, out, R, D, stride_b, stride_n, stride_d, BLOCK_D: tl.constexpr):
    """out[b, k] = embeddings[b, index[b, k]], one row per program."""
    row = tl.program_id(0).to(tl.int64)
    source = embeddings + (row // R) * stride_b + tl.load(index + row) * stride_n
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        tl.store(out + row * D + d, tl.load(source + d * stride_d, mask=d < D), mask=d < D)


def _index(scores: Tensor, r: int, valid: Tensor | None) -> Tensor:
    """Ascending indices [B, R] of the r best tokens, see `evocomp.ops.top_r_compact`."""
    b, n = scores.shape
    block = 1 << (n - 1).bit_length()
    index = torch.empty(b, r, dtype=torch.long, device=scores.device)
    with dispatch.launch_on(scores):
        _index_kernel[(b,)](
            scores,
            scores if valid is None else valid.contiguous(),
            index,
            n,
            r,
            *scores.stride(),
            HAS_VALID=valid is not None,
            BLOCK_N=block,
            num_warps=min(16, max(1, block // 256)),  # eight 64-bit keys per thread: more would spill
        )
    return index


_top_r_index = torch.library.custom_op("evocomp::top_r_index", _index, mutates_args=())


@_top_r_index.register_fake
def _(scores: Tensor, r: int, valid: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape[0], r, dtype=torch.long)


top_r_index = dispatch.without_gradient(_top_r_index, _index)


def _gather(embeddings: Tensor, index: Tensor) -> Tensor:
    """Rows [B, R, D] of embeddings [B, N, D] at index [B, R], which is distinct within a row; differentiable."""
    (b, r), d = index.shape, embeddings.shape[2]
    out = torch.empty(b, r, d, dtype=embeddings.dtype, device=embeddings.device)
    block = min(1024, 1 << (d - 1).bit_length())
    with dispatch.launch_on(embeddings):
        _gather_kernel[(b * r,)](embeddings, index.contiguous(), out, r, d, *embeddings.stride(), BLOCK_D=block)
    return out


_gather_embeddings = torch.library.custom_op("evocomp::gather_embeddings", _gather, mutates_args=())


@_gather_embeddings.register_fake
def _(embeddings: Tensor, index: Tensor) -> Tensor:
    return embeddings.new_empty(*index.shape, embeddings.shape[2])


def _setup(ctx, inputs, output) -> None:
    embeddings, index = inputs
    ctx.save_for_backward(index)
    ctx.tokens = embeddings.shape[1]


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    b, r, d = grad.shape
    # indices are distinct, so a plain write is enough and no atomic addition is needed
    return grad.new_zeros(b, ctx.tokens, d).scatter(1, index[..., None].expand(-1, -1, d), grad), None


gather_embeddings = dispatch.differentiable(_gather_embeddings, _gather, _setup, _backward)
