"""GHM-C in two launches: bin counts, then loss and its slope in one pass over the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evocomp.ops import dispatch

BLOCK = 1024  # B x N is 18k to 92k logits: some dozens of programs


@triton.jit
def _token_loss(logits, targets, valid, i, n, HAS_VALID: tl.constexpr):
    """(BCE, sigmoid(logit) - target, is a token) at i; logit and target count as 0 outside and in padding."""
    real = i < n
    if HAS_VALID:
        real = real & (tl.load(valid + i, mask=real, other=0) != 0)
    x = tl.load(logits + i, mask=real, other=0.0).to(tl.float32)
    y = tl.load(targets + i, mask=real, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(x))  # never overflows
    p = tl.where(x >= 0, 1.0, small) / (1 + small)
    # log(1 + e) loses e below 1e-7, an absolute error far below one ulp of a mean loss
    return tl.maximum(x, 0.0) - x * y + tl.log(1 + small), p - y, real


@triton.jit
def _bin(slope, BINS: tl.constexpr):
    # the lower bound is for NaN, whose integer may be anything: the loss shall be NaN, not a wild read
    return tl.maximum(tl.minimum((tl.abs(slope) * BINS).to(tl.int32), BINS - 1), 0)


@triton.jit
def _histogram_kernel(
    logits,
    targets,
    valid,
    counts,
    n,
    BINS: tl.constexpr,
    CELLS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[BINS] += the bins of this block's tokens. CELLS: a power of two above BINS."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, slope, real = _token_loss(logits, targets, valid, i, n, HAS_VALID)
    cell = tl.arange(0, CELLS)
    local = tl.histogram(tl.where(real, _bin(slope, BINS), BINS), CELLS)  # padding to a cell of its own
    tl.atomic_add(counts + cell, local.to(tl.int64), mask=cell < BINS)


@triton.jit
def _loss_kernel(
    logits,
    targets,
    valid,
    counts,
    slopes,
    partial,
    n,
    NON_EMPTY: tl.constexpr,
    BINS: tl.constexpr,
    CELLS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """slopes[i] = (p - y) / GD, partial[program] = sum of BCE / GD."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bce, slope, real = _token_loss(logits, targets, valid, i, n, HAS_VALID)
    regions = BINS * 1.0
    if NON_EMPTY:
        cell = tl.arange(0, CELLS)
        regions = tl.sum((tl.load(counts + cell, mask=cell < BINS, other=0) > 0).to(tl.float32))
        regions = tl.maximum(regions, 1.0)  # no token at all
    count = tl.load(counts + _bin(slope, BINS)).to(tl.float32)
    weight = tl.where(real & (count > 0), 1 / (tl.where(count > 0, count, 1.0) * regions), 0.0)
    tl.store(slopes + i, weight * slope, mask=i < n)
    tl.store(partial + tl.program_id(0), tl.sum(weight * bce))


def _flat(logits: Tensor, targets: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.contiguous()
    return logits, targets.contiguous(), logits if valid is None else valid.contiguous()


def _cells(bins: int) -> int:
    return 1 << bins.bit_length()


def _count(logits: Tensor, targets: Tensor, valid: Tensor | None, bins: int) -> Tensor:
    """See `evocomp.ops.ghm_histogram`."""
    counts = torch.zeros(bins, dtype=torch.long, device=logits.device)
    n = logits.numel()
    with dispatch.launch_on(logits):
        _histogram_kernel[(dispatch.blocks(n, BLOCK),)](
            *_flat(logits, targets, valid),
            counts,
            n,
            BINS=bins,
            CELLS=_cells(bins),
            HAS_VALID=valid is not None,
            BLOCK=BLOCK,
        )
    return counts


_ghm_histogram = torch.library.custom_op("evocomp::ghm_histogram", _count, mutates_args=())


@_ghm_histogram.register_fake
def _(logits: Tensor, targets: Tensor, valid: Tensor | None, bins: int) -> Tensor:
    return logits.new_empty(bins, dtype=torch.long)


ghm_histogram = dispatch.without_gradient(_ghm_histogram, _count)


def _weigh(
    logits: Tensor, targets: Tensor, valid: Tensor | None, counts: Tensor, rule: str
) -> tuple[Tensor, Tensor]:
    """Loss (scalar) and slopes (logits' shape, fp32), the loss's derivative by the logits."""
    n, bins = logits.numel(), counts.numel()
    programs = dispatch.blocks(n, BLOCK)
    slopes = torch.empty(logits.shape, device=logits.device)
    partial = torch.empty(programs, device=logits.device)  # summed afterwards: no float atomics, same bits
    with dispatch.launch_on(logits):
        _loss_kernel[(programs,)](
            *_flat(logits, targets, valid),
            counts.contiguous(),
            slopes,
            partial,
            n,
            NON_EMPTY=rule == "non_empty",
            BINS=bins,
            CELLS=_cells(bins),
            HAS_VALID=valid is not None,
            BLOCK=BLOCK,
        )
    return partial.sum(), slopes


_ghm_bce = torch.library.custom_op("evocomp::ghm_bce", _weigh, mutates_args=())


@_ghm_bce.register_fake
def _(logits: Tensor, targets: Tensor, valid: Tensor | None, counts: Tensor, rule: str):
    return logits.new_empty((), dtype=torch.float32), torch.empty(logits.shape, device=logits.device)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad: Tensor, _) -> tuple:
    return (grad * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None, None


_differentiable = dispatch.differentiable(_ghm_bce, _weigh, _setup, _backward)


def ghm_bce(logits: Tensor, targets: Tensor, valid: Tensor | None, counts: Tensor, rule: str) -> Tensor:
    """See `evocomp.ops.ghm_bce`; here the counts are always given."""
    return _differentiable(logits, targets, valid, counts, rule)[0]
