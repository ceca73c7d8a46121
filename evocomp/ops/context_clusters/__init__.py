"""Clusters of dropped visual tokens: farthest-point centres and the nearest centre of each token."""

import torch
from torch import Tensor

from evocomp.ops import dispatch
from evocomp.ops.context_clusters import reference

LARGEST = 8192
"""Largest N for the kernel, which keeps one value per token in registers and the N x N dot products in memory."""


@torch.no_grad()
def context_clusters(visual: Tensor, selected: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster the tokens that a mask drops, for several masks of each image.

    The first centre is the dropped token with the largest sum of cosines to all dropped tokens. Each further centre is
    the dropped token whose largest cosine to the centres so far is smallest (farthest-point sampling). Every dropped
    token is assigned to the centre of largest cosine; ties go to the centre of lowest index. A selected token is its
    own cluster. Cosines are computed in float32. Not differentiable.

    Args:
        visual: [B, N, D] visual tokens of B images, any floating dtype.
        selected: [B, K, R] indices of the selected tokens of K masks per image, distinct within a mask.
        count: C, number of centres, from 1 to N - R.

    Returns:
        Centres [B, K, C] int64, ascending, and the assignment [B, K, N] int64: the index of each token's centre, or the
        token itself if it is selected.
    """
    if visual.shape[1] <= LARGEST and dispatch.choose(visual) == "triton":
        from evocomp.ops.context_clusters import triton

        return triton.context_clusters(visual, selected, count)
    parts = [reference.context_clusters(*image, count) for image in zip(visual, selected, strict=True)]
    centres, assignment = zip(*parts, strict=True)
    return torch.stack(centres), torch.stack(assignment)
