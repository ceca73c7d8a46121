"""Which dtype an op computes in: fp64 inputs stay fp64 (tests), everything else is computed in fp32."""

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other dtype."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context without autocast: under it, products of fp32 tensors would silently run in bf16."""
    return torch.autocast(tensor.device.type, enabled=False)
