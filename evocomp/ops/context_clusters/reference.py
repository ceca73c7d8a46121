"""Farthest-point clusters in plain torch: one row of cosines per centre, so that no N x N matrix is needed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evocomp.ops.precision import full_precision


def context_clusters(visual: Tensor, selected: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """One image, visual [N, D] and selected [K, R]: see `evocomp.ops.context_clusters`."""
    with full_precision(visual):
        masks, total = len(selected), len(visual)
        unit = F.normalize(visual.float(), dim=-1)
        is_selected = torch.zeros(masks, total, dtype=torch.bool, device=visual.device).scatter_(1, selected, True)
        typical = (~is_selected).float() @ unit @ unit.T
        centre = typical.masked_fill(is_selected, -torch.inf).argmax(1)
        # largest cosine to the centres so far; infinite for tokens that cannot become a centre
        nearest = torch.full_like(typical, -torch.inf).masked_fill(is_selected, torch.inf)
        found = []
        for _ in range(count):
            found.append(centre)
            nearest = torch.maximum(nearest, unit[centre] @ unit.T).scatter_(1, centre[:, None], torch.inf)
            centre = nearest.argmin(1)
        centres = torch.stack(found, dim=1).sort(dim=1).values
        assignment = centres.gather(1, (unit @ unit[centres].mT).argmax(-1))
        everything = torch.arange(total, device=visual.device).expand(masks, -1)
        return centres, torch.where(is_selected, everything, assignment).scatter_(1, centres, centres)
