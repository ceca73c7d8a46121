"""GHM-C loss and its gradient: a single kernel launch for a usual batch, two launches for larger ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evocomp.ops import dispatch

BLOCK = 1024
# Up to this number of logits a single program computes counts and loss. A usual batch (B x N of 18k to 92k) takes one
# multiprocessor less time than a second launch takes the host, and needs neither zeroed counts nor a sum of partial
# losses.
ALONE = 1 << 17
BLOCK_ALONE, WARPS_ALONE = 4096, 32


@triton.jit
def _token_loss(logits, targets, valid, i, n, HAS_VALID: tl.constexpr):
    """(BCE, sigmoid(logit) - target, whether it is a valid token) at i; padding counts as logit 0 and target 0."""
    inside = i < n
    real = inside
    x = tl.load(logits + i, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(targets + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_VALID:  # load padding too and mask it here, because a mask in `tl.load` prevents vectorised loads
        real = inside & (tl.load(valid + i, mask=inside, other=0) != 0)
        x = tl.where(real, x, 0.0)
        y = tl.where(real, y, 0.0)
    small = tl.exp(-tl.abs(x))  # never overflows
    p = tl.where(x >= 0, 1.0, small) / (1 + small)
    # log(1 + e) rounds e below 1e-7 to 0, an absolute error far below one ulp of a mean loss
    return tl.maximum(x, 0.0) - x * y + tl.log(1 + small), p - y, real


@triton.jit
def _bin(slope, BINS: tl.constexpr):
    # the lower bound is for NaN, which converts to an arbitrary integer: the loss must be NaN, not an invalid read
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
    """Adds the histogram of this block's tokens to counts[BINS]. CELLS: a power of two above BINS."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, slope, real = _token_loss(logits, targets, valid, i, n, HAS_VALID)
    cell = tl.arange(0, CELLS)
    local = tl.histogram(tl.where(real, _bin(slope, BINS), BINS), CELLS)  # padding in an extra cell
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
    OWN_COUNTS: tl.constexpr,
    NON_EMPTY: tl.constexpr,
    BINS: tl.constexpr,
    CELLS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """slopes[i] = (p - y) / GD, partial[program] = sum of BCE / GD. OWN_COUNTS: the program computes counts itself."""
    cell = tl.arange(0, CELLS)
    if OWN_COUNTS:
        number = tl.zeros([CELLS], tl.int32)
        for start in range(0, n, BLOCK):
            _, slope, real = _token_loss(logits, targets, valid, start + tl.arange(0, BLOCK), n, HAS_VALID)
            number += tl.histogram(tl.where(real, _bin(slope, BINS), BINS), CELLS)
        count = number.to(tl.float32)
    else:
        count = tl.load(counts + cell, mask=cell < BINS, other=0).to(tl.float32)
    occupied = (count > 0) & (cell < BINS)
    regions = BINS * 1.0
    if NON_EMPTY:
        regions = tl.maximum(tl.sum(occupied.to(tl.float32)), 1.0)  # 1 if there is no token
    weights = tl.where(occupied, 1 / (tl.where(occupied, count, 1.0) * regions), 0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        bce, slope, real = _token_loss(logits, targets, valid, i, n, HAS_VALID)
        weight = tl.where(real, tl.gather(weights, _bin(slope, BINS), 0), 0.0)
        tl.store(slopes + i, weight * slope, mask=i < n)
        total += weight * bce
    tl.store(partial + tl.program_id(0), tl.sum(total))


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
    logits: Tensor, targets: Tensor, valid: Tensor | None, counts: Tensor | None, bins: int, rule: str
) -> tuple[Tensor, Tensor]:
    """Loss (scalar), and slopes (shape of the logits, fp32): the derivative of the loss with respect to the logits."""
    n = logits.numel()
    alone = n <= ALONE
    if counts is None and not alone:
        counts = _count(logits, targets, valid, bins)
    slopes = torch.empty(logits.shape, device=logits.device)
    # partial losses are summed afterwards, without float atomics, for deterministic results
    partial = torch.empty((1 if alone else dispatch.blocks(n, BLOCK),), device=logits.device)
    flat = _flat(logits, targets, valid)
    with dispatch.launch_on(logits):
        _loss_kernel[partial.shape](
            *flat,
            flat[0] if counts is None else counts.contiguous(),
            slopes,
            partial,
            n,
            OWN_COUNTS=counts is None,
            NON_EMPTY=rule == "non_empty",
            BINS=bins,
            CELLS=_cells(bins),
            HAS_VALID=valid is not None,
            BLOCK=BLOCK_ALONE if alone else BLOCK,
            num_warps=WARPS_ALONE if alone else 4,
        )
    return partial.view(()) if alone else partial.sum(), slopes


_ghm_bce = torch.library.custom_op("evocomp::ghm_bce", _weigh, mutates_args=())


@_ghm_bce.register_fake
def _(logits: Tensor, targets: Tensor, valid: Tensor | None, counts: Tensor | None, bins: int, rule: str):
    return logits.new_empty((), dtype=torch.float32), torch.empty(logits.shape, device=logits.device)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad: Tensor, _) -> tuple:
    return (grad * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None, None, None


_differentiable = dispatch.differentiable(_ghm_bce, _weigh, _setup, _backward)


def ghm_bce(
    logits: Tensor, targets: Tensor, valid: Tensor | None, counts: Tensor | None, bins: int, rule: str
) -> Tensor:
    """See `evocomp.ops.ghm_bce`; if counts are given, `bins` must be their number."""
    return _differentiable(logits, targets, valid, counts, bins, rule)[0]
