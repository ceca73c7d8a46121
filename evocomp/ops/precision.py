"""Dtype in which ops compute: fp64 for fp64 inputs (for tests), fp32 for all others."""

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other dtype."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context that disables autocast, which would silently compute products of fp32 tensors in bf16."""
    return torch.autocast(tensor.device.type, enabled=False)
