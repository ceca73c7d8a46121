"""Priority orders: an image's visual tokens sorted by an importance that does not depend on the question, best first.

A text-aware compressor can be hedged with such an order: it selects a fraction of the kept tokens, and the rest are the
first tokens of the order that it did not select. Questions of an unseen type then still find what is important in the
image.
"""

from typing import Literal

import torch
from torch import Tensor

from evocomp.log import UserError
from evocomp.selection.cls_attention import cls_scores
from evocomp.selection.divprune import divprune

Priority = Literal["cls_attention", "divprune", "uniform_stride"]

GOLDEN = (5**0.5 - 1) / 2


def priority_order(name: str, tokens: Tensor, cls_attention: Tensor | None = None) -> Tensor:
    """Indices of all tokens of an image, the most important first [N] int64.

    Args:
        name: "cls_attention": by the attention of the class token; "divprune": in DivPrune's order of selection (arXiv
            2503.02175); "uniform_stride": an order in which every prefix is spread evenly over the flattened grid.
        tokens: projected visual tokens [N, D].
        cls_attention: attention of the class token per head [H, N]; needed by "cls_attention".

    >>> priority_order("uniform_stride", torch.zeros(5, 2)).tolist()
    [0, 2, 4, 1, 3]
    """
    if name == "cls_attention":
        if cls_attention is None:
            raise UserError(
                "compressor.hedge_by=cls_attention needs a vision tower with a class token; "
                "use divprune or uniform_stride"
            )
        return cls_scores(cls_attention).argsort(descending=True, stable=True).to(tokens.device)
    if name == "divprune":
        return divprune(tokens, len(tokens))
    if name == "uniform_stride":
        # steps of the golden ratio: any prefix is spread evenly
        return ((torch.arange(len(tokens), device=tokens.device).double() * GOLDEN) % 1).argsort(stable=True)
    raise UserError(f"compressor.hedge_by={name!r} is unknown; use cls_attention, divprune or uniform_stride")


def fill(selected: Tensor, order: Tensor, count: int) -> Tensor:
    """The first `count` tokens of a priority order that are not selected.

    Args:
        selected: [..., R] token indices, distinct within a row.
        order: [N].
        count: at most N - R.

    Returns:
        [..., count] token indices, highest priority first.

    >>> fill(torch.tensor([[3, 1], [0, 2]]), torch.tensor([3, 2, 1, 0]), 2).tolist()
    [[2, 0], [3, 1]]
    """
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    free = rank.expand(*selected.shape[:-1], -1).clone().scatter_(-1, selected, len(order))
    return free.argsort(dim=-1, stable=True)[..., :count]
