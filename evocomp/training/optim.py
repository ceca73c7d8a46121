"""One optimizer that uses Muon for the matrices of the layers and AdamW for the rest; learning-rate schedule."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from evocomp.config.schema import OptimConfig
from evocomp.training.muon import FullPrecisionMuon

REFRESH_FLAT = 0.5  # share of steps before the second schedule decays; chosen on the selection split (LOG.md)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW combined in one optimizer, so that Lightning's accumulation, clipping and schedules work.

    Args:
        matrices: 2-D weights of hidden layers, for Muon (torch.optim.Muon, scaled to match AdamW's steps).
        rest: all other weights, for AdamW.
        full_precision: run Muon's Newton-Schulz iteration in the dtype of the weights; torch.optim.Muon runs it in
            bfloat16.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        rest: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        full_precision: bool = False,
    ):
        muon = FullPrecisionMuon if full_precision else torch.optim.Muon
        self.parts = {
            "muon": muon(
                list(matrices), lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ),
            "adamw": torch.optim.AdamW(list(rest), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay),
        }
        weights = [p for part in self.parts.values() for group in part.param_groups for p in group["params"]]
        super().__init__(weights, {"lr": lr})
        # the parameter groups are shared, so that learning rates set by a scheduler reach both optimizers
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Optimizer for all trainable weights of a compressor."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(
            [p for _, p in trainable], lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
    hidden = [p for name, p in trainable if p.ndim == 2 and "layers" in name]
    ours = {id(p) for p in hidden}
    rest = [p for _, p in trainable if id(p) not in ours]
    return MuonWithAdamW(hidden, rest, config.lr, config.weight_decay, config.muon_dtype == "float32")


def schedule(config: OptimConfig, total: int, first: int = 0) -> Callable[[int], float]:
    """Function from step to the factor on `optim.lr`: warm-up and decay, and a second time for `optim.refresh_lr`.

    Args:
        total: steps of the run.
        first: first step with refreshed labels; 0 = labels are not refreshed.
    """
    if not config.refresh_lr or not 0 < first < total:
        return partial(learning_rate, total=total, warmup=config.warmup_steps, flat=config.flat)

    def factor(step: int) -> float:
        if step < first:
            return learning_rate(step, first, config.warmup_steps, config.flat)
        again = learning_rate(step - first, total - first, config.warmup_steps, REFRESH_FLAT)
        return again * config.refresh_lr / config.lr

    return factor


def learning_rate(step: int, total: int, warmup: int, flat: float) -> float:
    """Factor on the peak rate: linear warm-up, constant for the share `flat` of the steps, linear decay to 1 %."""
    done = step / max(1, total)
    fall = 1 - max(0.0, (done - flat) / max(1e-9, 1 - flat))
    return min(1.0, (step + 1) / max(1, warmup)) * (0.99 * max(0.0, fall) + 0.01)
