"""K-Token Merging: a small learned encoder merges each block of K consecutive tokens into one (arXiv 2604.15153).

It follows the authors' code (github.com/shsjxzh/K-Token-Merging, April 2026), which shortens text prompts for an LLM
adapted with LoRA; here it merges visual tokens. Unlike the other selectors it must be trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = {1: 2.0, 2: 2.0, 3: 2.0}
"""Width of the hidden layer by block size K, as a multiple of K * D."""

WIDTH = 1.5
"""Width of the hidden layer for K >= 4, as a multiple of K * D. The authors give no value for K > 4; there it is our
choice."""


class BlockMerger(nn.Module):
    """Merges each contiguous block of `block` tokens of width `hidden_size` into one token.

    merged = mean of the block + MLP(concatenated block). As in the authors' code, the MLP has three linear layers with
    ReLU between them, of widths K D -> 1.5 to 2 K D -> K D -> D, with PyTorch's default initialisation. A shorter last
    block, which the authors' code does not support, is padded with zeros and averaged over its own tokens.

    Args:
        hidden_size: D.
        block: K.
    """

    def __init__(self, hidden_size: int, block: int):
        super().__init__()
        if block < 1:
            raise ValueError(f"block must be at least 1 token, not {block}")
        self.block = block
        size, width = block * hidden_size, int(WIDTHS.get(block, WIDTH) * block) * hidden_size
        self.residual = nn.Sequential(
            nn.Linear(size, width), nn.ReLU(), nn.Linear(width, size), nn.ReLU(), nn.Linear(size, hidden_size)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., N, D] -> [..., ceil(N / block), D]."""
        n = tokens.shape[-2]
        blocks = F.pad(tokens, (0, 0, 0, -n % self.block)).unflatten(-2, (-1, self.block))
        sizes = torch.full((blocks.shape[-3], 1), self.block, dtype=tokens.dtype, device=tokens.device)
        sizes[-1:] -= -n % self.block
        return blocks.sum(-2) / sizes + self.residual(blocks.flatten(-2))

    def positions(self, n: int) -> Tensor:
        """Index [ceil(n / block)] of each merged token's position: the (lower) middle of its block."""
        start = torch.arange(0, n, self.block)
        return (start + (start + self.block).clamp(max=n) - 1) // 2
