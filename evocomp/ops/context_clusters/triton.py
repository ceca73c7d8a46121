"""Farthest-point clusters from a matrix of dot products: one program per mask runs all steps in one kernel launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evocomp.ops import dispatch
from evocomp.ops.precision import full_precision

HALVES = (torch.bfloat16, torch.float16)


@triton.jit
def _clusters_kernel(products, scale, typical, selected, centres, assignment, N, masks, count, BLOCK_N: tl.constexpr):
    """Computes centres [B*K, count] in order of selection, and assignment [B*K, N].

    products: [B, N, N] dot products of the tokens; scale: [B, N] inverse norms; typical: [B*K, N] sums of cosines to
    all dropped tokens; selected: [B*K, N]
    """
    mask = tl.program_id(0).to(tl.int64)
    image = mask // masks
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    rows = products + image * N * N
    inverse = tl.load(scale + image * N + n, mask=inside, other=0.0)
    fixed = tl.load(selected + mask * N + n, mask=inside, other=1) != 0
    score = tl.load(typical + mask * N + n, mask=inside, other=0.0)
    centre = tl.argmax(tl.where(fixed, -float("inf"), score), axis=0, tie_break_left=True)
    nearest = tl.where(fixed, float("inf"), -float("inf"))  # largest cosine to the centres; inf: cannot become a centre
    best = nearest  # largest cosine to the centres; inf: assignment is fixed
    assigned = n
    for step in range(count):
        tl.store(centres + mask * count + step, centre.to(tl.int64))
        row = tl.load(rows + centre.to(tl.int64) * N + n, mask=inside, other=0.0)
        cosine = row * inverse * tl.load(scale + image * N + centre)
        chosen = n == centre
        # ties go to the centre of lowest index, not to the one that was selected first
        better = (cosine > best) | ((cosine == best) & (centre < assigned))
        assigned = tl.where(chosen, n, tl.where(better & (best < float("inf")), centre, assigned))
        best = tl.where(chosen, float("inf"), tl.maximum(best, cosine))
        nearest = tl.where(chosen, float("inf"), tl.maximum(nearest, cosine))
        centre = tl.argmin(nearest, axis=0, tie_break_left=True)
    tl.store(assignment + mask * N + n, assigned.to(tl.int64), mask=inside)


def _products(visual: Tensor) -> Tensor:
    """Dot products [B, N, N] in float32. GPUs multiply 16-bit inputs exactly and accumulate in float32."""
    if visual.is_cuda and visual.dtype in HALVES:
        return torch.bmm(visual, visual.mT, out_dtype=torch.float32)
    return torch.bmm(visual.float(), visual.float().mT)


def context_clusters(visual: Tensor, selected: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `evocomp.ops.context_clusters`."""
    with full_precision(visual), dispatch.launch_on(visual):
        (b, n, _), k = visual.shape, selected.shape[1]
        products = _products(visual)
        scale = torch.linalg.vector_norm(visual, dim=-1, dtype=torch.float32).clamp_min_(1e-12).reciprocal_()
        is_selected = torch.zeros(b, k, n, dtype=torch.bool, device=visual.device).scatter_(2, selected, True)
        weights = scale[:, None].masked_fill(is_selected, 0.0)
        typical = torch.bmm(weights, products).mul_(scale[:, None])
        centres = torch.empty(b, k, count, dtype=torch.long, device=visual.device)
        assignment = torch.empty(b, k, n, dtype=torch.long, device=visual.device)
        block = max(16, 1 << (n - 1).bit_length())
        _clusters_kernel[(b * k,)](
            products,
            scale,
            typical,
            is_selected,
            centres,
            assignment,
            n,
            k,
            count,
            BLOCK_N=block,
            num_warps=min(16, max(1, block // 256)),
        )
        return centres.sort(dim=-1).values, assignment
