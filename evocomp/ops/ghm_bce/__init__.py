"""Gradient-harmonised binary cross-entropy (GHM-C, arXiv 1811.05181) with a density histogram."""

from torch import Tensor

from evocomp.log import UserError
from evocomp.ops import dispatch
from evocomp.ops.ghm_bce import reference

RULES = ("paper", "non_empty")


def ghm_histogram(logits: Tensor, targets: Tensor, valid: Tensor | None = None, bins: int = 10) -> Tensor:
    """Number of valid tokens in each bin of the gradient norm g = |sigmoid(logit) - target|.

    Counts are integers, so that their sum over ranks does not depend on the order.

    Args:
        logits, targets: same shape; targets in [0, 1], bool or floating.
        valid: bool, same shape; False for padding, which is not counted.
        bins: number of equal bins on [0, 1]; the last one includes 1.

    Returns:
        counts [bins] int64.
    """
    assert logits.shape == targets.shape and (valid is None or valid.shape == logits.shape)
    if dispatch.choose(logits) == "triton":
        from evocomp.ops.ghm_bce import triton

        return triton.ghm_histogram(logits, targets, valid, bins)
    return reference.ghm_histogram(logits, targets, valid, bins)


def ghm_bce(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    bins: int = 10,
    counts: Tensor | None = None,
    rule: str = "paper",
) -> Tensor:
    """GHM-C: sum over valid tokens of BCE(logit, target) / GD(g), where GD is the count of g's bin x number of bins.

    The factor 1/n of the published loss cancels the n in its weights n / GD. Densities are detached: d loss / d logit =
    (sigmoid(logit) - target) / GD. Values in padding are ignored, including NaN.

    Args:
        logits: any shape, any floating dtype; computed in fp32 (fp64 for fp64).
        targets: same shape, in [0, 1], bool or floating; no gradient.
        valid: bool, same shape; False for padding.
        bins: number of bins on [0, 1]; ignored when `counts` is given.
        counts: [bins] counts to use instead of those of this batch (sums over ranks, or running means).
        rule: number of bins in GD: "paper" uses all bins (arXiv 1811.05181, eq. 6 with a histogram), "non_empty" the
            occupied bins only (the authors' and mmdetection's code). They differ if a bin is empty.

    Returns:
        Scalar loss (fp32, or fp64); 0 with zero gradient if there is no valid token.

    Raises:
        UserError: unknown rule.
    """
    assert logits.shape == targets.shape and (valid is None or valid.shape == logits.shape)
    if rule not in RULES:
        raise UserError(f"GHM rule {rule!r} is unknown; choose one of {', '.join(RULES)}")
    if dispatch.choose(logits) == "triton":
        from evocomp.ops.ghm_bce import triton

        return triton.ghm_bce(logits, targets, valid, counts, bins if counts is None else counts.numel(), rule)
    if counts is None:
        counts = ghm_histogram(logits, targets, valid, bins)
    return reference.ghm_bce(logits, targets, valid, counts, rule)
