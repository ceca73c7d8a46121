"""Groups by density-peak clustering: the baseline that the paper's vocabulary groups are compared with.

DPC-KNN: Du, Ding and Jia, "Study on density peaks clustering based on k-nearest neighbors and principal
component analysis", Knowledge-Based Systems 2016; for visual tokens: TCFormer, arXiv 2204.08680.
"""

import torch

from evocomp.grouping.groups import Groups
from evocomp.log import UserError


@torch.no_grad()
def dpc_knn_groups(tokens: torch.Tensor, count: int, neighbours: int = 5) -> Groups:
    """Cluster the visual tokens [N, D] of one image into `count` groups (at most N).

    The density of a token is exp(-mean squared distance to its nearest neighbours). The centres are the `count` tokens
    with the largest product of density and distance to the nearest denser token. Every token is assigned to its nearest
    centre. Distances are divided by sqrt(D); ties go to the token of lower index.
    """
    if count < 1 or neighbours < 1:
        raise UserError(f"dpc_knn needs at least 1 group and 1 neighbour, got {count} and {neighbours}")
    num_tokens = len(tokens)
    count = min(count, num_tokens)
    tokens = tokens.float()
    distance = torch.cdist(tokens, tokens) / tokens.shape[1] ** 0.5
    to_others = distance.clone().fill_diagonal_(torch.inf)
    nearest = to_others.topk(min(neighbours, num_tokens - 1), largest=False).values
    # a single token has no neighbours; its density does not matter
    density = (-nearest.square().mean(-1)).exp().nan_to_num(1.0)
    rank = torch.empty(num_tokens, dtype=torch.long, device=tokens.device)
    rank[density.argsort(descending=True, stable=True)] = torch.arange(num_tokens, device=tokens.device)
    denser = rank[None, :] < rank[:, None]
    separation = distance.masked_fill(~denser, torch.inf).min(-1).values
    separation = torch.where(rank == 0, distance.max(), separation)
    centres = (density * separation).argsort(descending=True, stable=True)[:count].sort().values
    joined = distance[:, centres].argmin(-1)
    # a centre that equals an earlier one must keep its own group
    joined[centres] = torch.arange(count, device=tokens.device)
    return Groups.from_ids(joined.cpu().numpy())
