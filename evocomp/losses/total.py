"""Supervised losses of the compressor by name."""

from collections.abc import Callable

from torch import Tensor, nn

from evocomp.log import UserError
from evocomp.losses.bce import bce_loss
from evocomp.losses.focal import focal_loss
from evocomp.losses.ghm import GHMC, ReduceCounts
from evocomp.losses.listwise import listwise_loss
from evocomp.losses.separation import separation_loss

LOSSES = {
    "ghm_cs": "GHM-C + alpha * cosine separation (the paper)",
    "ghm": "GHM-C alone (ablation)",
    "focal_cs": "focal loss + alpha * cosine separation (ablation)",
    "bce_cs": "cross-entropy + alpha * cosine separation (ablation)",
    "bce": "cross-entropy alone (ablation)",
    "listwise": "cross-entropy of softmaxed credits (ours)",
}


class SupervisedLoss(nn.Module):
    """A classification or listwise term; for names that end in _cs, plus alpha x cosine separation."""

    def __init__(self, name: str, term: nn.Module, alpha: float) -> None:
        super().__init__()
        self.term_name = name.removesuffix("_cs")
        self.term = term
        self.alpha = alpha
        self.separates = name.endswith("_cs")

    def forward(
        self, logits: Tensor, hidden: Tensor | None, targets: Tensor, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the loss and its terms as scalars.

        Args:
            logits: [B, N].
            hidden: [B, N, D]; may be None for losses without cosine separation.
            targets: [B, N] in [0, 1]; for "listwise" the credits, any real numbers.
            valid: [B, N] bool, False for padding.

        Returns:
            {"loss": ..., "<ghm|focal|bce|listwise>": ..., and with separation "separation": ... (unweighted)}
        """
        value = self.term(logits, targets, valid)
        if not self.separates:
            return {"loss": value, self.term_name: value}
        assert hidden is not None, "this loss reads the hidden states"
        separation = separation_loss(hidden, targets, valid)
        return {"loss": value + self.alpha * separation, self.term_name: value, "separation": separation}


class _Term(nn.Module):
    """A module that calls a loss function with fixed options."""

    def __init__(self, function: Callable[..., Tensor], **options: float | None) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, logits: Tensor, targets: Tensor, valid: Tensor | None) -> Tensor:
        return self.function(logits, targets, valid, **self.options)


def build_loss(
    name: str = "ghm_cs",
    alpha: float = 0.1,
    *,
    form: str = "histogram",
    bins: int = 10,
    eps: float = 0.05,
    reduce_counts: ReduceCounts | None = None,
    temperature: float = 0.1,
) -> SupervisedLoss:
    """The loss `name` (a key of `LOSSES`): (logits, hidden, targets, valid) -> dict of the loss and its terms.

    Args:
        alpha: weight of cosine separation; the paper does not give its value.
        form, bins, eps, reduce_counts: of GHM-C, see `GHMC`.
        temperature: of the listwise targets, see `listwise_loss`.

    Raises:
        UserError: unknown name or form.
    """
    if name not in LOSSES:
        raise UserError(f"loss {name!r} is unknown; choose one of {', '.join(LOSSES)}")
    term: nn.Module
    match name.removesuffix("_cs"):
        case "ghm":
            term = GHMC(form, bins, eps, reduce_counts=reduce_counts)
        case "focal":
            term = _Term(focal_loss)
        case "bce":
            term = _Term(bce_loss)
        case "listwise":
            term = _Term(listwise_loss, temperature=temperature)
    return SupervisedLoss(name, term, alpha)
