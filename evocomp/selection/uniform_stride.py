"""Uniform stride: evenly spaced tokens of the flattened grid."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector


def uniform_stride(n: int, r: int, device: torch.device | None = None) -> Tensor:
    """floor((i + 0.5) * n / r) for i = 0..r-1, ascending and distinct for any r <= n [r].

    >>> uniform_stride(144, 4).tolist()
    [18, 54, 90, 126]
    """
    return (2 * torch.arange(r, device=device) + 1) * n // max(2 * r, 1)


@dataclass(frozen=True)
class UniformStride(Selector):
    """Evenly spaced tokens: exactly `keep`, unlike `arange(0, n, n // keep)`, which overshoots."""

    name = "uniform_stride"

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        return Selection.of(uniform_stride(len(inputs), keep, inputs.tokens.device))
