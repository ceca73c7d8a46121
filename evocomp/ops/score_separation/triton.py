"""Classifier logits and cosine separation in one pass over the hidden states; the backward also takes one pass."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from evocomp.ops import dispatch
from evocomp.ops.score_separation.reference import EPS

ROWS = 32  # tokens per program: writing its two partial sums costs an eighth of its bf16 reads
FINISH_BLOCK = 512  # columns per program of the kernel that adds partial sums


@triton.jit
def _tile(
    hidden,
    retained,
    valid,
    b,
    n,
    N,
    D,
    stride_b,
    stride_n,
    stride_d,
    HAS_VALID: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(h [rows, BLOCK_D] with zeros in padding, in I0, in I1, is a valid token) for rows n of sample b."""
    inside = n < N
    real = inside
    if HAS_VALID:
        real = inside & (tl.load(valid + b * N + n, mask=inside, other=0) != 0)
    d = tl.arange(0, BLOCK_D)
    rows = hidden + b * stride_b + n.to(tl.int64)[:, None] * stride_n
    h = tl.load(rows + d[None, :] * stride_d, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    kept = tl.load(retained + b * N + n, mask=inside, other=0) != 0
    return h, real & (kept == 0), real & kept, real


@triton.jit
def _forward_kernel(
    hidden,
    weight,
    bias,
    retained,
    valid,
    logits,
    norms,
    sums,
    sizes,
    N,
    D,
    stride_b,
    stride_n,
    stride_d,
    EPS: tl.constexpr,
    HAS_HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes norms [B, N], logits [B, N], and per program the sums of unit vectors [B, chunks, 2, D] and sizes."""
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    sum0 = tl.zeros([BLOCK_D], tl.float32)
    sum1 = tl.zeros([BLOCK_D], tl.float32)
    size0 = tl.zeros([TILE], tl.float32)
    size1 = tl.zeros([TILE], tl.float32)
    if HAS_HEAD:
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        offset = 0.0
        if HAS_BIAS:
            offset = tl.load(bias).to(tl.float32)
    for start in range(chunk * ROWS, (chunk + 1) * ROWS, TILE):
        n = start + tl.arange(0, TILE)
        h, zero, one, real = _tile(
            hidden, retained, valid, b, n, N, D, stride_b, stride_n, stride_d, HAS_VALID, BLOCK_D
        )
        norm = tl.sqrt(tl.sum(h * h, axis=1))
        inverse = 1 / tl.maximum(norm, EPS)
        sum0 += tl.sum(h * tl.where(zero, inverse, 0.0)[:, None], axis=0)
        sum1 += tl.sum(h * tl.where(one, inverse, 0.0)[:, None], axis=0)
        size0 += zero.to(tl.float32)
        size1 += one.to(tl.float32)
        tl.store(norms + b * N + n, norm, mask=n < N)
        if HAS_HEAD:
            score = tl.where(real, tl.sum(h * w[None, :], axis=1) + offset, 0.0)
            tl.store(logits + b * N + n, score, mask=n < N)
    slot = (b * tl.num_programs(1) + chunk) * 2
    tl.store(sums + slot * D + d, sum0, mask=d < D)
    tl.store(sums + (slot + 1) * D + d, sum1, mask=d < D)
    tl.store(sizes + slot, tl.sum(size0))
    tl.store(sizes + slot + 1, tl.sum(size1))


@triton.jit
def _finish_kernel(sums, sizes, means, size, products, chunks, D, BLOCK: tl.constexpr):
    """Computes means [B, 2, D] and size [B, 2] from partial sums, and products [B, blocks], whose sum is CS."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum0 = tl.zeros([BLOCK], tl.float32)
    sum1 = tl.zeros([BLOCK], tl.float32)
    size0 = 0.0
    size1 = 0.0
    for chunk in range(chunks):
        slot = (b * chunks + chunk) * 2
        sum0 += tl.load(sums + slot * D + d, mask=d < D, other=0.0)
        sum1 += tl.load(sums + (slot + 1) * D + d, mask=d < D, other=0.0)
        size0 += tl.load(sizes + slot)
        size1 += tl.load(sizes + slot + 1)
    size0 = tl.maximum(size0, 1.0)  # an empty segment has sum 0, mean 0 and CS 0
    size1 = tl.maximum(size1, 1.0)
    tl.store(means + b * 2 * D + d, sum0 / size0, mask=d < D)
    tl.store(means + (b * 2 + 1) * D + d, sum1 / size1, mask=d < D)
    tl.store(size + b * 2, size0)
    tl.store(size + b * 2 + 1, size1)
    tl.store(products + b * tl.num_programs(1) + tl.program_id(1), tl.sum(sum0 * sum1) / (size0 * size1))


@triton.jit
def _backward_kernel(
    hidden,
    weight,
    retained,
    valid,
    norms,
    means,
    size,
    grad_logits,
    grad_separation,
    grad_hidden,
    grad_weight,
    N,
    D,
    stride_b,
    stride_n,
    stride_d,
    EPS: tl.constexpr,
    HAS_HEAD: tl.constexpr,
    HAS_VALID: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes grad_hidden [B, N, D] and partial sums of grad_weight [B, chunks, D]; see README.md for the formula."""
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    up = tl.load(grad_separation + b)
    mean0 = tl.load(means + b * 2 * D + d, mask=d < D, other=0.0)
    mean1 = tl.load(means + (b * 2 + 1) * D + d, mask=d < D, other=0.0)
    pull0 = mean1 * (up / tl.load(size + b * 2))  # for discarded tokens: along the mean of the retained ones
    pull1 = mean0 * (up / tl.load(size + b * 2 + 1))
    if HAS_HEAD:
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        weight_sum = tl.zeros([BLOCK_D], tl.float32)
    for start in range(chunk * ROWS, (chunk + 1) * ROWS, TILE):
        n = start + tl.arange(0, TILE)
        h, zero, one, real = _tile(
            hidden, retained, valid, b, n, N, D, stride_b, stride_n, stride_d, HAS_VALID, BLOCK_D
        )
        norm = tl.load(norms + b * N + n, mask=n < N, other=0.0)
        inverse = 1 / tl.maximum(norm, EPS)
        pull = tl.where(one[:, None], pull1[None, :], tl.where(zero[:, None], pull0[None, :], 0.0))
        # two factors of moderate size instead of inverse**3
        along = tl.sum(pull * h, axis=1) * inverse
        grad = pull * inverse[:, None]
        grad -= h * tl.where(norm > EPS, along * inverse * inverse, 0.0)[:, None]
        if HAS_HEAD:
            up_logit = tl.load(grad_logits + b * N + n, mask=real, other=0.0)
            grad += up_logit[:, None] * w[None, :]
            weight_sum += tl.sum(up_logit[:, None] * h, axis=0)
        out = grad_hidden + (b * N + n)[:, None] * D + d[None, :]
        tl.store(out, grad.to(grad_hidden.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])
    if HAS_HEAD:
        tl.store(grad_weight + (b * tl.num_programs(1) + chunk) * D + d, weight_sum, mask=d < D)


def _launch(width: int, values: int) -> dict[str, int]:
    """Launch options for tiles of at most `values` numbers and rows of `width`; checked for register spills."""
    block_d = 1 << (width - 1).bit_length()
    tile = max(1, min(4, values // block_d))
    return {"ROWS": ROWS, "TILE": tile, "BLOCK_D": block_d, "num_warps": min(16, max(4, block_d // 512))}


def _launch_forward(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, retained: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logits [B, N], or [0] without a weight, separation [B], norms [B, N], means [B, 2, D], size [B, 2])"""
    (b, n, d), chunks = hidden.shape, dispatch.blocks(hidden.shape[1], ROWS)
    blocks = dispatch.blocks(d, FINISH_BLOCK)
    make = {"device": hidden.device, "dtype": torch.float32}
    logits = torch.empty((b, n) if weight is not None else (0,), **make)
    norms, means, size = torch.empty(b, n, **make), torch.empty(b, 2, d, **make), torch.empty(b, 2, **make)
    sums, sizes = torch.empty(b, chunks, 2, d, **make), torch.empty(b, chunks, 2, **make)
    products = torch.empty(b, blocks, **make)
    with dispatch.launch_on(hidden):
        _forward_kernel[(b, chunks)](
            hidden,
            hidden if weight is None else weight.contiguous(),
            hidden if bias is None else bias,
            retained.contiguous(),
            hidden if valid is None else valid.contiguous(),
            logits,
            norms,
            sums,
            sizes,
            n,
            d,
            *hidden.stride(),
            EPS=EPS,
            HAS_HEAD=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_VALID=valid is not None,
            **_launch(d, 16384),
        )
    with dispatch.launch_on(hidden):
        _finish_kernel[(b, blocks)](sums, sizes, means, size, products, chunks, d, BLOCK=FINISH_BLOCK)
    return logits, products.sum(-1), norms, means, size


_forward = torch.library.custom_op("evocomp::score_separation", _launch_forward, mutates_args=())


@_forward.register_fake
def _(hidden, weight, bias, retained, valid):
    b, n, d = hidden.shape

    def make(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    return make(b, n) if weight is not None else make(0), make(b), make(b, n), make(b, 2, d), make(b, 2)


def _launch_backward(
    grad_logits: Tensor,
    grad_separation: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    retained: Tensor,
    valid: Tensor | None,
    norms: Tensor,
    means: Tensor,
    size: Tensor,
) -> tuple[Tensor, Tensor]:
    """(grad_hidden [B, N, D] in the dtype of `hidden`, grad_weight [D] fp32, or [0] without a weight)"""
    (b, n, d), chunks = hidden.shape, dispatch.blocks(hidden.shape[1], ROWS)
    grad_hidden = torch.empty(b, n, d, dtype=hidden.dtype, device=hidden.device)
    partial = torch.empty((b * chunks, d) if weight is not None else (1, 0), device=hidden.device)
    with dispatch.launch_on(hidden):
        _backward_kernel[(b, chunks)](
            hidden,
            hidden if weight is None else weight.contiguous(),
            retained.contiguous(),
            hidden if valid is None else valid.contiguous(),
            norms,
            means,
            size,
            grad_logits.contiguous(),
            grad_separation.contiguous(),
            grad_hidden,
            partial,
            n,
            d,
            *hidden.stride(),
            EPS=EPS,
            HAS_HEAD=weight is not None,
            HAS_VALID=valid is not None,
            **_launch(d, 8192),
        )
    return grad_hidden, partial.sum(0)


_backward_op = torch.library.custom_op("evocomp::score_separation_backward", _launch_backward, mutates_args=())


@_backward_op.register_fake
def _(grad_logits, grad_separation, hidden, weight, retained, valid, norms, means, size):
    columns = 0 if weight is None else hidden.shape[2]
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device), norms.new_empty(columns)


def _setup(ctx, inputs, output) -> None:
    hidden, weight, bias, retained, valid = inputs
    ctx.save_for_backward(hidden, weight, bias, retained, valid, *output[2:])


def _gradient(ctx, grad_logits: Tensor | None, grad_separation: Tensor | None, launch: Callable) -> tuple:
    hidden, weight, bias, retained, valid, norms, *saved = ctx.saved_tensors
    grad_logits = torch.zeros_like(norms) if grad_logits is None else grad_logits
    grad_separation = norms.new_zeros(len(norms)) if grad_separation is None else grad_separation
    grad_hidden, grad_weight = launch(grad_logits, grad_separation, hidden, weight, retained, valid, norms, *saved)
    grad_bias = None
    if bias is not None:
        real = grad_logits if valid is None else grad_logits.masked_fill(~valid, 0)
        grad_bias = real.sum().to(bias.dtype).reshape(bias.shape)
    return grad_hidden, None if weight is None else grad_weight.to(weight.dtype), grad_bias, None, None


def _backward(ctx, grad_logits, grad_separation, *_) -> tuple:
    return _gradient(ctx, grad_logits, grad_separation, _backward_op)


def _direct_backward(ctx, grad_logits, grad_separation, *_) -> tuple:
    return _gradient(ctx, grad_logits, grad_separation, _launch_backward)


_differentiable = dispatch.differentiable(_forward, _launch_forward, _setup, _backward, _direct_backward)


def score_separation(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, retained: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `evocomp.ops.score_separation`."""
    return _differentiable(hidden, weight, bias, retained, valid)[:2]


def cosine_separation(hidden: Tensor, retained: Tensor, valid: Tensor | None) -> Tensor:
    """See `evocomp.ops.cosine_separation`."""
    return _differentiable(hidden, None, None, retained, valid)[1]
