"""GHM-C (arXiv 1811.05181), the paper's first loss term: BCE divided by the density of its gradient norm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evocomp.log import UserError
from evocomp.losses import masked
from evocomp.ops import ghm_bce, ghm_histogram
from evocomp.ops.ghm_bce import RULES

ReduceCounts = Callable[[Tensor], Tensor]
"""Sums an int64 tensor over all ranks and returns the sum (one all-reduce)."""


class GHMC(nn.Module):
    """GHM-C over all valid tokens of the batch: (logits, targets, valid) -> scalar loss.

    The loss is sum_i BCE_i / GD(g_i) with g_i = |sigmoid(logit_i) - target_i| and detached densities.

    With `reduce_counts`, the densities are those of the combined batch of all ranks, and the result is multiplied by
    the number of ranks. Its mean over ranks, which DDP's gradient averaging computes, is then the loss of the combined
    batch, even if ranks have different numbers of tokens.

    Args:
        form: "histogram" (equal bins on [0, 1]) or "exact" (a window around every g, see `exact_density`).
        bins: number of bins of the histogram.
        eps: half-width of the exact window; 0.05 is as wide as one of 10 bins.
        rule: "paper" divides by all bins, "non_empty" by occupied bins only (the authors' code). Histogram only.
        momentum: momentum of running bin counts in training mode; 0: use the counts of each batch. Running counts start
            at 0 without bias correction, and bins that a batch leaves empty do not change, as in the authors' code.
        reduce_counts: sums counts over ranks; None in a single process. Histogram only.

    Raises:
        UserError: unknown form or rule, or an option that the exact form does not support.
    """

    running_counts: Tensor

    def __init__(
        self,
        form: str = "histogram",
        bins: int = 10,
        eps: float = 0.05,
        rule: str = "paper",
        momentum: float = 0.0,
        reduce_counts: ReduceCounts | None = None,
    ) -> None:
        super().__init__()
        if form not in ("histogram", "exact"):
            raise UserError(f"GHM form {form!r} is unknown; choose histogram or exact")
        if rule not in RULES:
            raise UserError(f"GHM rule {rule!r} is unknown; choose one of {', '.join(RULES)}")
        if form == "exact" and (momentum or reduce_counts or rule != "paper"):
            raise UserError(
                "the exact GHM form has no bins and supports neither several ranks, momentum nor rule=non_empty; "
                "use form=histogram"
            )
        self.form, self.bins, self.eps, self.rule = form, bins, eps, rule
        self.momentum, self.reduce_counts = momentum, reduce_counts
        if momentum:
            self.register_buffer("running_counts", torch.zeros(bins))

    def forward(self, logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
        """logits, targets (in [0, 1]) and valid (bool) of one shape, usually [B, N]; returns a scalar."""
        if self.form == "exact":
            return exact_ghm_loss(logits, targets, valid, self.eps)
        if not self.momentum and self.reduce_counts is None:
            return ghm_bce(logits, targets, valid, self.bins, rule=self.rule)
        counts = ghm_histogram(logits, targets, valid, self.bins)
        ranks: Tensor | int = 1
        if self.reduce_counts is not None:
            # one all-reduce for both: the sum of a 1 from every rank is the number of ranks
            total = self.reduce_counts(torch.cat([counts, counts.new_ones(1)]))
            counts, ranks = total[:-1], total[-1]
        if not self.momentum:
            return ghm_bce(logits, targets, valid, counts=counts, rule=self.rule) * ranks
        return ghm_bce(logits, targets, valid, counts=self._smooth(counts), rule="paper") * ranks

    def _smooth(self, counts: Tensor) -> Tensor:
        """[bins] running counts, scaled so that `ghm_bce` with rule "paper" gives the result of this module's rule."""
        occupied = counts > 0
        moved = self.momentum * self.running_counts + (1 - self.momentum) * counts
        running = torch.where(occupied, moved, self.running_counts)
        if self.training:
            self.running_counts.copy_(running)
        # non_empty divides by the number of bins that THIS batch occupies, even if running counts have more
        return running * (occupied.sum() / self.bins) if self.rule == "non_empty" else running


def exact_density(norm: Tensor, eps: float) -> Tensor:
    """GD(g_i) = #{k : |g_k - g_i| < eps} / l_eps(g_i), the density without bins, in O(n log n).

    l_eps(g) = min(g + eps, 1) - max(g - eps, 0) is the length of the window inside [0, 1]. The epsilon of arXiv
    1811.05181 is 2 eps: its window extends by epsilon / 2 to either side.

    Args:
        norm: [n] gradient norms in [0, 1].
        eps: half-width of the window.

    Returns:
        [n] densities, at least 1 / (2 eps).
    """
    ordered = norm.sort().values
    low, high = norm - eps, norm + eps
    inside = torch.searchsorted(ordered, high) - torch.searchsorted(ordered, low, right=True)
    return inside / (high.clamp_max(1) - low.clamp_min(0))


def exact_ghm_loss(logits: Tensor, targets: Tensor, valid: Tensor | None = None, eps: float = 0.05) -> Tensor:
    """GHM-C with the exact window: sum over valid tokens of BCE / GD, GD from `exact_density`, detached."""
    logits = masked.clean(logits, valid)
    targets = masked.clean(targets.to(logits.dtype), valid)
    with torch.no_grad():
        norm = (torch.sigmoid(logits) - targets).abs()
        if valid is not None:
            # outside of every valid token's window, so that no density counts padding
            norm = norm.masked_fill(~valid, 3.0)
        weight = exact_density(norm.flatten(), eps).reciprocal().view_as(norm)
        if valid is not None:
            weight = weight.masked_fill(~valid, 0)
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weight, reduction="sum")
