"""Tolerances for comparing the hidden states of two implementations of the same decoder."""

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest relative error of hidden states (norm of the difference / norm of the expected); 5 % in half precision."""


def same_states(given: Tensor, expected: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether hidden states are equal up to rounding in the least precise of the number formats `dtypes`."""
    tolerance = max(TOLERANCE.get(dtype, 5e-2) for dtype in dtypes)
    given, expected = given.float(), expected.float()
    return bool((given - expected).norm() <= tolerance * expected.norm())
