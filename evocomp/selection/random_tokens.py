"""Random tokens: the baseline for every selector. Report mean and spread over at least three seeds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evocomp.selection.base import Selection, SelectionInputs, Selector


def random_tokens(n: int, r: int, generator: torch.Generator) -> Tensor:
    """`r` of `n` indices drawn without replacement, ascending [r]."""
    return torch.randperm(n, generator=generator, device=generator.device)[:r].sort().values


@dataclass(frozen=True)
class RandomTokens(Selector):
    """Random tokens. Seed `generator` per sample, so that the selection does not depend on the order of samples."""

    name = "random_tokens"
    needs = frozenset({"generator"})

    def select(self, inputs: SelectionInputs, keep: int) -> Selection:
        return Selection.of(random_tokens(len(inputs), keep, inputs.generator).to(inputs.tokens.device))
