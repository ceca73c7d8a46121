"""Optimizer, schedule and checkpoints of both stages of `nano_mllm.py`."""

from pathlib import Path

import numpy as np
import torch
from torch import nn


class State:
    """The state of a stage in one file, for resuming after an interruption."""

    def __init__(self, path: Path, parts: dict, rng: np.random.Generator, draw: torch.Generator):
        self.path, self.parts, self.rng, self.draw = path, parts, rng, draw

    def load(self) -> int:
        """Load the saved state, if there is one; returns the number of finished steps."""
        if not self.path.exists():
            return 0
        kept = torch.load(self.path)
        for name, part in self.parts.items():
            part.load_state_dict(kept[name])
        self.rng.bit_generator.state = kept["rng"]
        self.draw.set_state(kept["draw"])
        print(f"resuming from step {kept['step']} of {self.path}", flush=True)
        return kept["step"]

    def save(self, step: int) -> None:
        kept = {name: part.state_dict() for name, part in self.parts.items()}
        kept.update(step=step, rng=self.rng.bit_generator.state, draw=self.draw.get_state())
        temporary = self.path.with_suffix(".tmp")
        torch.save(kept, temporary)
        temporary.replace(self.path)


def muon_and_adamw(matrices, everything, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of the layers, AdamW for the rest (converges clearly faster than AdamW alone)."""
    ours = {id(p) for p in matrices}
    rest = [p for p in everything if id(p) not in ours]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, flat: float) -> float:
    """Warm-up over 50 steps, constant for the share `flat` of the steps, then linear decay to 1 %."""
    done = step / steps
    return min(1.0, (step + 1) / 50) * (1 - max(0.0, (done - flat) / (1 - flat))) + 0.01


def update(optimizers, loss: torch.Tensor, lr: float) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    weights = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
